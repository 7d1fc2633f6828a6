"""Files that are either the old ones or the new ones, whenever the power fails."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
from pathlib import Path


def digest(path: Path) -> str:
    """blake2b-256 of a file's content, in hexadecimal, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=32)).hexdigest()


def digest_bytes(data: bytes) -> str:
    """blake2b-256 of ``data``, in hexadecimal."""
    return hashlib.blake2b(data, digest_size=32).hexdigest()


def sync_file(path: Path) -> None:
    """Waits until a file's content is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(path: Path) -> None:
    """Waits until a folder's entries (names, renames, removals) are on the disk.

    File systems that cannot synchronise a folder say so with EINVAL or ENOTSUP; there is nothing more to do on them.
    """
    try:
        sync_file(path)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise


def write_new(path: Path, data: bytes) -> None:
    """Writes a file that does not exist yet and waits until it is on the disk. Raises OSError."""
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def replace(path: Path, data: bytes) -> None:
    """Puts ``data`` in place of a file's content in one step: a crash leaves all of the old or all of the new.

    Raises OSError, with the old file untouched and nothing left behind.
    """
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        temporary.unlink(missing_ok=True)
        write_new(temporary, data)
        temporary.rename(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)
