"""From a config to tokens that can be trained on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graft.config.experiment import DataConfig, Experiment
from graft.data.build import build_stores, trained_tokenizer
from graft.data.progress import Progress, reporting
from graft.data.split import SIDES, SplitSource
from graft.data.store import TokenStore
from graft.data.tokenizers.base import Tokenizer
from graft.errors import ConfigError, DataError, ResourceError


@dataclass(frozen=True)
class PreparedData:
    """Tokens of a run.

    Args:
        tokenizer: text to ids and back.
        train: the training documents.
        validation: the held-out documents.
        fingerprint: changes when a document, its side, or an id does; does not depend on where files lie.
        report: documents, tokens, bytes and bytes_per_token of each side; rows skipped, by cause; folder of the stores.
        warnings: what is allowed and probably not meant; whoever shows the data to a person says it.
    """

    tokenizer: Tokenizer
    train: TokenStore
    validation: TokenStore
    fingerprint: str
    report: dict[str, Any]
    warnings: tuple[str, ...] = ()

    @property
    def vocab_size(self) -> int:
        """Number of ids of the tokenizer."""
        return self.tokenizer.vocab_size


def prepare(experiment: Experiment, *, progress: Progress | None = None) -> PreparedData:
    """The data of ``experiment``, tokenised now or found in the cache, checked to be enough for one row.

    Args:
        experiment: ``data``, ``runtime.cache_dir`` and ``model.vocab_size`` are read.
        progress: told how far it is; None = bars on stderr if that is a terminal.

    Raises:
        DataError: the text is missing, unusable or too short, or the cached tokens are damaged.
        ConfigError: the model has fewer rows than the tokenizer has ids.
        ResourceError: the cache cannot be written, or an optional package is missing.
    """
    prepared = prepare_data(experiment.data, Path(experiment.runtime.cache_dir), progress=progress)
    for side in SIDES:
        _check_length(getattr(prepared, side), side, experiment.data.seq_len)
    rows = experiment.model.vocab_size
    if rows is not None and rows < prepared.vocab_size:
        raise ConfigError(
            f"vocab_size {rows} is less than the tokenizer's {prepared.vocab_size} ids",
            where="model.vocab_size",
            fix=f"remove it, or set it to at least {prepared.vocab_size}",
        )
    return prepared


def prepare_data(data: DataConfig, cache_dir: Path, *, progress: Progress | None = None) -> PreparedData:
    """`prepare` for a data config alone, whatever the length of a row."""
    cache_dir = cache_dir.expanduser()
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ResourceError(
            f"the data cache cannot be made: {error.strerror or error}",
            where=str(cache_dir),
            fix="set runtime.cache_dir to a folder that can be written",
        ) from error
    split = SplitSource(data, cache_dir)
    with reporting(progress) as report_progress:
        tokenizer = trained_tokenizer(data.tokenizer, split, cache_dir, data.max_bad_rows, report_progress)
        built = build_stores(split, tokenizer, cache_dir, data.max_bad_rows, report_progress)
    stores = {side: TokenStore.open(built.folder / side) for side in SIDES}
    for side in SIDES:
        counts = built.report[side]
        counts["bytes_per_token"] = counts["bytes"] / max(1, counts["tokens"] - counts["documents"])
    built.report["folder"] = str(built.folder)
    far_off = split.far_off(built.report["validation"], built.report["train"])
    warnings = () if far_off is None else (far_off,)
    return PreparedData(tokenizer, stores["train"], stores["validation"], built.fingerprint, built.report, warnings)


def _check_length(store: TokenStore, side: str, seq_len: int) -> None:
    if store.num_tokens <= seq_len:
        fix = "lower data.seq_len, or give more text"
        raise DataError(
            f"the {side} documents have {store.num_tokens} tokens, less than one row",
            where="data",
            expected=f"at least seq_len + 1 = {seq_len + 1} tokens",
            fix=fix if side == "train" else f"{fix}, or hold out more (data.validation)",
        )
