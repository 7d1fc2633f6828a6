"""``base: path`` in a config: start from another file, then lay this one over it (`graft.config.merge`)."""

from __future__ import annotations

import os
from pathlib import Path as FilePath

import graft
from graft.config.documents import read_document
from graft.config.merge import merge
from graft.config.report import ConfigProblems
from graft.config.tree import Document, Located, Node

MAX_INCLUDES = 16
"""Longest chain of bases."""


def preset_folders() -> list[FilePath]:
    """Where ``presets/…`` is looked up: beside the sources of a checkout, or inside the installed package."""
    package = FilePath(graft.__file__).parent
    return [folder for folder in (package.parent.parent / "presets", package / "presets") if folder.is_dir()]


def find_config(name: str, folder: FilePath) -> FilePath:
    """The file ``name`` means: relative to ``folder``, else (``presets/…``) one of graft's own presets."""
    path = folder / name
    if not path.exists() and FilePath(name).parts[:1] == ("presets",):
        for presets in preset_folders():
            shipped = presets.joinpath(*FilePath(name).parts[1:])
            if shipped.is_file():
                return shipped
    return path


def read_with_bases(path: str | FilePath) -> Document:
    """Reads a config and everything below it.

    Args:
        path: the file; a name that starts with ``presets/`` also finds graft's own.

    Returns:
        The merged document without ``base``, with the problems of every file.

    Raises:
        ConfigProblems: a file cannot be read, bases form a circle, or ``base`` is no path.
    """
    return _read(find_config(str(path), FilePath()), ())


def _shown(path: FilePath) -> str:
    """Relative to the working directory when it is below it: short, and what editors can jump to."""
    full = os.path.abspath(path)
    relative = os.path.relpath(full)
    return full if relative.startswith("..") else relative


def _read(path: FilePath, chain: tuple[FilePath, ...]) -> Document:
    document = read_document(path, _shown(path))
    assert isinstance(document.root.value, dict)
    base = document.root.value.pop("base", None)
    if base is None or base.value is None:
        return document
    chain = (*chain, path.resolve())
    below = _read(_base_path(base, path, chain), chain)
    return Document(merge(below.root, document.root), below.problems + document.problems)


def _base_path(base: Node, path: FilePath, chain: tuple[FilePath, ...]) -> FilePath:
    if not isinstance(base.value, str) or not base.value:
        raise ConfigProblems([Located(base.place, ("base",), "must be the path of a config", "base: presets/models/…")])
    target = find_config(base.value, path.parent)
    if target.resolve() in chain:
        circle = " -> ".join(p.name for p in (*chain, target.resolve()))
        raise ConfigProblems([Located(base.place, ("base",), f"the bases form a circle: {circle}", "break it")])
    if len(chain) >= MAX_INCLUDES:
        raise ConfigProblems([Located(base.place, ("base",), f"more than {MAX_INCLUDES} bases in a chain")])
    if not target.is_file():
        missing = f"'{base.value}' is no file (looked for {_shown(target)})"
        raise ConfigProblems(
            [Located(base.place, ("base",), missing, "paths are relative to the file that names them")]
        )
    return target
