"""Collects the prose that comes with the running Python: its documentation topics and its docstrings.

Three places, read in this order: ``pydoc_data.topics`` (the language reference), the docstrings of the standard
library's modules (parsed, never imported), and the docstrings of modules written in C. A stripped Python has fewer of
them and simply gives less. The text is CPython's (PSF licence); nothing of it is shipped with graft.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MIN_WORDS = 8
"""Shorter paragraphs are headings and signatures."""

MIN_LETTERS = 0.75
"""Share of letters and spaces below which a paragraph is code or a table."""

SKIPPED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "pydoc_data", "__pycache__"}
)
"""Folders of the standard library that hold other people's packages, tests, or what another place gives."""

# fmt: off
C_MODULES = (
    "_asyncio", "_bisect", "_blake2", "_bz2", "_csv", "_ctypes", "_datetime", "_decimal", "_elementtree",
    "_hashlib", "_heapq", "_json", "_lsprof", "_lzma", "_multibytecodec", "_opcode", "_pickle", "_queue", "_random",
    "_socket", "_sqlite3", "_ssl", "_statistics", "_struct", "_uuid", "_zoneinfo", "array", "binascii", "cmath",
    "fcntl", "grp", "math", "mmap", "pyexpat", "resource", "select", "syslog", "termios", "unicodedata", "zlib",
)
# fmt: on
"""Extension modules that are safe to import (none touches the terminal, a display or the network), beside those
compiled into the interpreter."""

Section = tuple[str, list[str]]
"""Name of a module or topic, and its paragraphs."""


def harvest() -> Iterator[Section]:
    """Every module's and topic's prose, each paragraph once, in a fixed order."""
    seen: set[str] = set()
    for name, texts in _places():
        paragraphs = []
        for text in texts:
            for paragraph in prose(text):
                if paragraph not in seen:
                    seen.add(paragraph)
                    paragraphs.append(paragraph)
        if paragraphs:
            yield name, paragraphs


def _places() -> Iterator[tuple[str, Iterator[str]]]:
    yield from _topics()
    yield from _python_modules()
    yield from _c_modules()


def prose(text: str) -> Iterator[str]:
    """The paragraphs of ``text`` that read like sentences, their white space normalised."""
    for block in re.split(r"\n[ \t]*\n", text):
        if ">>>" in block:  # an interactive session, not prose
            continue
        paragraph = " ".join(block.split())
        letters = sum(c.isalpha() or c == " " for c in paragraph)
        if len(paragraph.split(" ")) >= MIN_WORDS and letters >= MIN_LETTERS * len(paragraph):
            yield paragraph


def _topics() -> Iterator[tuple[str, Iterator[str]]]:
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError:  # stripped installations leave it out
        return
    for name in sorted(topics):
        yield f"topic {name}", iter([topics[name]])


def _python_modules() -> Iterator[tuple[str, Iterator[str]]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    files = (p for p in root.rglob("*.py") if not SKIPPED_FOLDERS.intersection(p.relative_to(root).parts))
    for name, path in sorted((_module_name(p.relative_to(root)), p) for p in files):
        yield name, _docstrings(path)


def _module_name(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def _docstrings(path: Path) -> Iterator[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old string escapes in someone else's file
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError):  # files kept as bad examples, or not readable
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            doc = ast.get_docstring(node)
            if doc and _is_text(doc):
                yield doc


def _is_text(doc: str) -> bool:
    try:
        doc.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return "\0" not in doc


def _c_modules() -> Iterator[tuple[str, Iterator[str]]]:
    for name in sorted({*sys.builtin_module_names, *C_MODULES}):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # modules on their way out say so when imported
                module = importlib.import_module(name)
        except ImportError:
            continue
        yield f"{name} (C)", _member_docs(module, name)


def _member_docs(module: Any, name: str) -> Iterator[str]:
    """Docstrings of a C module, its functions, its classes and their members, by name."""
    yield from _doc(module)
    for _, member in sorted(vars(module).items()):
        if getattr(member, "__module__", None) not in (name, name.lstrip("_"), None):
            continue
        if isinstance(member, type):
            yield from _doc(member)
            for _, attribute in sorted(vars(member).items()):
                yield from _doc(attribute)
        elif inspect.isroutine(member):
            yield from _doc(member)


def _doc(value: Any) -> Iterator[str]:
    doc = getattr(value, "__doc__", None)
    if isinstance(doc, str) and not isinstance(value, str | int | float | bytes | tuple):
        yield inspect.cleandoc(doc)
