"""``graft tokenizer``: train a tokenizer and keep it in a folder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from graft.cli._options import Json, Overrides, console, print_json
from graft.errors import ConfigError

if TYPE_CHECKING:
    from graft.config.experiment import DataConfig

app = typer.Typer(add_completion=False)


@app.callback()
def tokenizer() -> None:
    """Train a tokenizer and keep it in a folder."""


@app.command()
def train(
    config: Annotated[str | None, typer.Argument(help="Config file whose data and tokenizer are used.")] = None,
    overrides: Overrides = None,
    files: Annotated[
        list[str] | None, typer.Option("--files", help="Instead of a config: files, folders or globs to train on.")
    ] = None,
    vocab_size: Annotated[
        int | None, typer.Option(help="Ids in all; with --files, or to change the config's.", min=257)
    ] = None,
    out: Annotated[str, typer.Option(help="Folder the tokenizer is written to.")] = "tokenizer",
    cache_dir: Annotated[str, typer.Option(help="With --files: where work is kept.")] = ".graft_cache",
    as_json: Json = False,
) -> None:
    """Train a tokenizer on training documents and report how well it compresses held-out ones.

    With a config: the config's tokenizer on its data. With --files A B …: byte-level BPE on these files. The folder of
    a BPE tokenizer can be used in a config as data.tokenizer: {type: file, path: FOLDER}.
    """
    from pathlib import Path

    from graft.data.prepare import prepare_data

    data, cache = _data(config, overrides, files, vocab_size, cache_dir)
    prepared = prepare_data(data, Path(cache))
    prepared.tokenizer.save(out)
    report = {
        "folder": out,
        "vocab_size": prepared.vocab_size,
        "fingerprint": prepared.tokenizer.fingerprint(),
        "train": prepared.report["train"],
        "validation": prepared.report["validation"],
    }
    if as_json:
        print_json(report)
    else:
        _print(report)


def _data(
    config: str | None, overrides: list[str] | None, files: list[str] | None, vocab_size: int | None, cache_dir: str
) -> tuple[DataConfig, str]:
    """The data config to train on, and the cache folder."""
    if files is None:
        if config is None:
            raise ConfigError("neither a config nor --files given", fix="give one")
        from graft import api

        changes = [*(overrides or [])]
        if vocab_size is not None:
            changes.append(f"data.tokenizer.vocab_size={vocab_size}")
        experiment = api.load(config, changes)
        return experiment.data, experiment.runtime.cache_dir
    if vocab_size is None:
        raise ConfigError("--files needs --vocab-size", fix="give the number of ids, e.g. --vocab-size 4096")
    from graft.config.experiment import DataConfig

    settings = {
        "source": {"type": "files", "path": (*files, *([config] if config else []), *(overrides or []))},
        "tokenizer": {"type": "bpe", "vocab_size": vocab_size},
        "seq_len": 2,
    }
    return DataConfig.model_validate(settings), cache_dir


def _print(report: dict[str, Any]) -> None:
    out = console()
    for side in ("train", "validation"):
        part = report[side]
        out.print(
            f"{side}: {part['bytes']:,} bytes in {part['tokens']:,} tokens = {part['bytes_per_token']:.3f} bytes/token"
        )
    out.print(f"{report['vocab_size']:,} ids, fingerprint {report['fingerprint']}\nwritten to {report['folder']}")
