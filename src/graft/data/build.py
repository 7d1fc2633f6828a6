"""Text to token stores and trained tokenizers in the cache: atomic, resumable, safe for two processes at once."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from filelock import FileLock

from graft.config.families import TokenizerConfig
from graft.data.fingerprint import fingerprint
from graft.data.progress import Progress
from graft.data.sources.base import BadRows, Document
from graft.data.split import SIDES, Side, SplitSource
from graft.data.store import STORE_FORMAT
from graft.data.store_writer import StoreWriter, sync_folder, write_json
from graft.data.tokenizers.base import META_FILE, Tokenizer, load_tokenizer
from graft.errors import DataError, GraftError, ResourceError
from graft.faults import fault_point

CHUNK_CHARACTERS = 2**22
"""Text that is tokenised at once, and then committed."""

REPORT = "report.json"
JOURNAL = "journal.json"
SAMPLE_DOCUMENTS, SAMPLE_CHARACTERS = 64, 4000
"""How much of the training text a fast tokenizer is checked on before it is used."""


@contextmanager
def committed_folder(final: Path) -> Iterator[Path | None]:
    """A folder that appears whole or not at all.

    Gives None when ``final`` exists; else a working folder (kept from a killed process, if there is one) that becomes
    ``final`` when the block ends without an error. One process at a time: others wait, then find it done.

    Raises:
        ResourceError: the disk is full or cannot be written.
    """
    if final.is_dir():
        yield None
        return
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{final}.lock"):
            if final.is_dir():
                yield None
                return
            work = final.with_name(final.name + ".partial")
            work.mkdir(exist_ok=True)
            try:
                yield work
            except GraftError:  # the data is wrong: when it is repaired, it has another name
                shutil.rmtree(work, ignore_errors=True)
                raise
            sync_folder(work)
            fault_point("data.rename")
            os.replace(work, final)
            sync_folder(final.parent)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EPERM):
            raise
        raise ResourceError(
            f"the data cache cannot be written: {error.strerror}",
            where=str(final.parent),
            fix="free space there, or set runtime.cache_dir to another folder; preparation continues where it stopped",
        ) from error


def trained_tokenizer(
    config: TokenizerConfig, split: SplitSource, cache_dir: Path, max_bad_rows: int, progress: Progress
) -> Tokenizer:
    """The configured tokenizer; one that needs training is trained on the training documents once and kept."""
    tokenizer: Tokenizer = config.build()
    if tokenizer.trained:
        return tokenizer
    key = fingerprint("trained tokenizer", config.to_dict(), split.fingerprint())
    final = cache_dir / "tokenizers" / key
    with committed_folder(final) as work:
        if work is not None:
            _, documents = split.documents(max_bad_rows)
            texts = (document.text for side, document in documents if side == "train")
            tokenizer.train(_counted(texts, split, progress))
            tokenizer.save(work)
            fault_point("data.tokenizer", path=work / META_FILE)
    return load_tokenizer(final)


def _counted(texts: Iterator[str], split: SplitSource, progress: Progress) -> Iterator[str]:
    total = None if split.validation_source is not None else float(split.census().characters)
    done = 0
    for text in texts:
        yield text
        done += len(text)
        progress("training the tokenizer", done, total)


@dataclass
class Built:
    """Where the two stores of a run lie, and what was found while they were built."""

    folder: Path
    fingerprint: str
    report: dict[str, Any]


def build_stores(
    split: SplitSource, tokenizer: Tokenizer, cache_dir: Path, max_bad_rows: int, progress: Progress
) -> Built:
    """Tokenises both sides of ``split`` into ``cache_dir/tokens/<fingerprint>/{train,validation}``, unless done.

    Raises:
        DataError: one side holds nothing, or more than ``max_bad_rows`` rows are unusable.
    """
    key = fingerprint("tokens", STORE_FORMAT, split.fingerprint(), tokenizer.fingerprint())
    final = cache_dir / "tokens" / key
    with committed_folder(final) as work:
        if work is not None:
            _tokenise(split, tokenizer, work, max_bad_rows, progress)
    report = _read_report(final)
    if (skipped := sum(report["skipped"].values())) > max_bad_rows:
        raise DataError(
            f"{skipped} unusable rows, the first: {report['first_skipped'][0]}",
            expected=f"at most {max_bad_rows} (data.max_bad_rows)",
            fix="repair the rows, or raise data.max_bad_rows to skip them",
        )
    return Built(final, key, report)


def _read_report(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / REPORT).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"the report of the tokenised data cannot be read: {error}",
            where=str(folder / REPORT),
            fix="delete the folder it lies in; the next run tokenises the text again",
        ) from error


def _tokenise(split: SplitSource, tokenizer: Tokenizer, work: Path, max_bad_rows: int, progress: Progress) -> None:
    journal = _read_journal(work)
    writers: dict[Side, StoreWriter] = {
        side: StoreWriter(
            work / side,
            vocab_size=tokenizer.vocab_size,
            end_of_document=tokenizer.end_of_document,
            state=journal["stores"].get(side),
        )
        for side in SIDES
    }
    try:
        bad_rows, documents = split.documents(max_bad_rows)
        _check_fast_way(tokenizer, split, max_bad_rows)
        _write_documents(documents, tokenizer, writers, journal, work, split, progress)
        _finish(writers, bad_rows, tokenizer, work)
    finally:
        for writer in writers.values():
            writer.close()


def _write_documents(
    documents: Iterator[tuple[Side, Document]],
    tokenizer: Tokenizer,
    writers: dict[Side, StoreWriter],
    journal: dict[str, Any],
    work: Path,
    split: SplitSource,
    progress: Progress,
) -> None:
    """Tokenises what the journal has not seen yet; the documents before it are read again but not tokenised."""
    total = None if split.validation_source is not None else float(split.census().characters)
    done = journal["characters"]
    remaining = islice(documents, journal["documents"], None)
    for number, chunk in enumerate(_chunks(remaining), start=journal["chunks"] + 1):
        for side in SIDES:
            _append(writers[side], tokenizer, [document for s, document in chunk if s == side])
        fault_point("data.append", number)
        done += sum(len(document.text) for _, document in chunk)
        journal["documents"] += len(chunk)
        journal["chunks"], journal["characters"] = number, done
        journal["stores"] = {side: writers[side].commit() for side in SIDES}
        write_json(work / JOURNAL, journal)
        fault_point("data.chunk", number)
        progress("tokenising", done, total)


def _append(writer: StoreWriter, tokenizer: Tokenizer, documents: list[Document]) -> None:
    if not documents:
        return
    ids = encode_documents(tokenizer, documents)
    for document, encoded in zip(documents, ids, strict=True):
        if (encoded == tokenizer.end_of_document).any():
            raise DataError(
                "the text gives the end-of-document id in the middle of the document",
                where=document.where,
                expected="an end-of-document token that no text can spell",
                fix="choose a special token as data.tokenizer.end_of_document",
            )
    writer.append(ids, sum(len(document.text.encode()) for document in documents))


def encode_documents(tokenizer: Tokenizer, documents: list[Document]) -> list[Any]:
    """The ids of each document. An error says which document it is about."""
    try:
        return tokenizer.encode_batch([document.text for document in documents])
    except DataError:
        for document in documents:  # find the one it is about
            try:
                tokenizer.encode_batch([document.text])
            except DataError as error:
                raise DataError(error.problem, where=document.where, expected=error.expected, fix=error.fix) from error
        raise


def _chunks(documents: Iterator[tuple[Side, Document]]) -> Iterator[list[tuple[Side, Document]]]:
    chunk: list[tuple[Side, Document]] = []
    size = 0
    for side, document in documents:
        chunk.append((side, document))
        size += len(document.text)
        if size >= CHUNK_CHARACTERS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _check_fast_way(tokenizer: Tokenizer, split: SplitSource, max_bad_rows: int) -> None:
    """Compares the fast and the plain way of encoding on the first documents, before either is used."""
    _, documents = split.documents(max_bad_rows)
    tokenizer.check_sample([d.text[:SAMPLE_CHARACTERS] for _, d in islice(documents, SAMPLE_DOCUMENTS)])


def _read_journal(work: Path) -> dict[str, Any]:
    try:
        return json.loads((work / JOURNAL).read_text(encoding="utf-8"))
    except FileNotFoundError:
        for side in SIDES:
            shutil.rmtree(work / side, ignore_errors=True)
        return {"documents": 0, "chunks": 0, "characters": 0, "stores": {}}


def _finish(writers: dict[Side, StoreWriter], bad_rows: BadRows, tokenizer: Tokenizer, work: Path) -> None:
    if not any(writer.shards for writer in writers.values()):
        skipped = bad_rows.causes.total()
        detail = f": all of its {skipped} rows are unusable, e.g. {bad_rows.first[0]}" if skipped else ""
        raise DataError(f"the data holds no document{detail}", where="data.source", fix="give text to train on")
    for side in SIDES:
        if not writers[side].shards:
            raise DataError(
                f"there is no {side} document", where="data", fix="change data.validation, or give more text"
            )
    counts = {side: writers[side].finish() for side in SIDES}
    fault_point("data.manifest")
    tokenizer.save(work / "tokenizer")
    report = {
        "skipped": dict(sorted(bad_rows.causes.items())),
        "first_skipped": bad_rows.first,
        **{side: {name: counts[side][name] for name in ("documents", "tokens", "bytes")} for side in SIDES},
    }
    write_json(work / REPORT, report)
    fault_point("data.report")
    (work / JOURNAL).unlink()
