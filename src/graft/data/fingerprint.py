"""One way to turn settings and content into a short identity."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

HASH = "blake2b-128"
"""Name of the hash behind every identity and shard sum of the data layer."""


def new_hash() -> Any:
    """An empty BLAKE2b hash of 128 bits."""
    return hashlib.blake2b(digest_size=16)


def fingerprint(*parts: Any) -> str:
    """32 hexadecimal digits that change when any of the JSON-able ``parts`` does."""
    digest = new_hash()
    digest.update(json.dumps(parts, sort_keys=True, ensure_ascii=True, separators=(",", ":")).encode())
    return digest.hexdigest()


def file_hash(path: Path) -> str:
    """The hash of a file's bytes, read in pieces."""
    digest = new_hash()
    with path.open("rb") as stream:
        while block := stream.read(2**22):
            digest.update(block)
    return digest.hexdigest()
