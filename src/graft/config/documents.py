"""Reads YAML 1.2, JSON and TOML into a `Document`: plain data plus the place of every key and value.

Limits keep hostile or broken files from costing time: file size, nesting, number of values (an alias counts each time
it is used). What cannot be read at all raises one `ConfigProblems`; what can be read but is wrong (a key given twice,
an unknown YAML tag) is collected in ``Document.problems`` beside whatever validation finds later.
"""

from __future__ import annotations

from pathlib import Path as FilePath

from graft.config.json_reader import read_json
from graft.config.report import one_problem
from graft.config.toml_reader import read_toml
from graft.config.tree import Document
from graft.config.yaml_reader import read_yaml

MAX_BYTES = 256 * 1024
"""Largest config file: far above any real one, small enough to be parsed in seconds."""

READERS = {".yaml": read_yaml, ".yml": read_yaml, ".json": read_json, ".toml": read_toml}


def read_document(path: FilePath, shown: str | None = None) -> Document:
    """Reads one config file by its suffix.

    Args:
        path: the file.
        shown: how messages name it (default: the path).

    Raises:
        ConfigProblems: the file is missing, too large, not UTF-8, empty, not of its format, or no table.
    """
    shown = shown or str(path)
    text = _read_text(path, shown)
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise one_problem(shown, f"the suffix '{path.suffix}' is no config format", f"use {', '.join(READERS)}")
    if not text.strip():
        raise one_problem(shown, "the file is empty", "a config needs at least model, objective, data, …", line=1)
    document = reader(text, shown)
    if not isinstance(document.root.value, dict):
        kind = "a list" if isinstance(document.root.value, list) else "a single value"
        place = document.root.place
        raise one_problem(
            shown, f"the top level is {kind}", "expected a table of keys", line=place.line or 1, col=place.col
        )
    return document


def _read_text(path: FilePath, shown: str) -> str:
    if not path.is_file():
        kind = "is not a file" if path.exists() else "does not exist"
        raise one_problem(shown, f"the config {kind}", _siblings(path))
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise one_problem(shown, f"the config cannot be read: {error.strerror}") from error
    if len(raw) > MAX_BYTES:
        raise one_problem(
            shown, f"the file is larger than {MAX_BYTES // 1024} KiB", "a config holds settings, not data"
        )
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        col = error.start - (raw.rfind(b"\n", 0, error.start) + 1) + 1
        raise one_problem(
            shown, f"byte 0x{raw[error.start]:02x} is not UTF-8", "save the file as UTF-8", line=line, col=col
        ) from error


def _siblings(path: FilePath) -> str:
    from difflib import get_close_matches

    if not path.parent.is_dir():
        return f"there is no folder {path.parent}"
    names = [p.name for p in path.parent.iterdir() if p.suffix.lower() in READERS]
    close = get_close_matches(path.name, names, n=1)
    return f"did you mean '{path.parent / close[0]}'?" if close else "check the path"
