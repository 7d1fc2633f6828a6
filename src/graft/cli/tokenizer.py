"""``graft tokenizer``: train a tokenizer and keep it in a folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from graft.cli._options import Json, Overrides, console, print_json
from graft.errors import ConfigError, GraftError

if TYPE_CHECKING:
    from graft.config.experiment import DataConfig

app = typer.Typer(add_completion=False)

FILE_OPTIONS = {
    "data.source.path": "--files",
    "data.source.format": "--format",
    "data.source.text_field": "--text-field",
    "data.validation.source": "validation.source of a config",
    "data.validation.fraction": "--validation-fraction",
    "data.validation,": "--validation-fraction,",
    "data.tokenizer.vocab_size": "--vocab-size",
    "data.tokenizer.min_frequency": "min_frequency of a config",
    "data.max_bad_rows": "--max-bad-rows",
    "runtime.cache_dir": "--cache-dir",
}
"""What messages say of a config -> what can be done where there is none, most often an option."""


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
    cache_dir: Annotated[
        str | None, typer.Option(help="With --files: where work is kept (default: .graft_cache).")
    ] = None,
    text_field: Annotated[
        str | None,
        typer.Option(help="With --files: field of a JSON Lines or Parquet row with the text (default: text)."),
    ] = None,
    format: Annotated[
        Literal["text", "jsonl", "parquet"] | None,
        typer.Option(help="With --files: what they are (default: by suffix)."),
    ] = None,
    validation_fraction: Annotated[
        float | None, typer.Option(help="With --files: share of the documents held out (default: 0.05).")
    ] = None,
    max_bad_rows: Annotated[
        int | None, typer.Option(help="With --files: rows that may be unusable (default: 0).", min=0)
    ] = None,
    as_json: Json = False,
) -> None:
    """Train a tokenizer on training documents and report how well it compresses held-out ones.

    With a config: the config's tokenizer on its data. With --files A B …: byte-level BPE on these files. The folder of
    a BPE tokenizer can be used in a config as data.tokenizer: {type: file, path: FOLDER}.
    """
    from pathlib import Path

    from graft.data.prepare import prepare_data

    only_files = {
        "data.source.format": format,
        "data.source.text_field": text_field,
        "data.validation.fraction": validation_fraction,
        "data.max_bad_rows": max_bad_rows,
        "runtime.cache_dir": cache_dir,
    }
    given = {field: value for field, value in only_files.items() if value is not None}
    if files is None:
        data, cache = _data_of_config(config, overrides, vocab_size, given)
        prepared = prepare_data(data, Path(cache))
        warnings = prepared.warnings
    else:
        paths = (*files, *([config] if config else []), *(overrides or []))
        with _options_named():
            data = _data_of_files(paths, vocab_size, given)
            prepared = prepare_data(data, Path(cache_dir or ".graft_cache"))
        warnings = tuple(map(_as_options, prepared.warnings))
    prepared.tokenizer.save(out)
    report = {
        "folder": out,
        "vocab_size": prepared.vocab_size,
        "fingerprint": prepared.tokenizer.fingerprint(),
        "train": prepared.report["train"],
        "validation": prepared.report["validation"],
        "warnings": list(warnings),
    }
    if as_json:
        print_json(report)
    else:
        _print(report)


def _data_of_config(
    config: str | None, overrides: list[str] | None, vocab_size: int | None, only_files: Mapping[str, Any]
) -> tuple[DataConfig, str]:
    """The data of a config, and its cache folder."""
    if config is None:
        raise ConfigError("neither a config nor --files given", fix="give one")
    for field, value in only_files.items():
        raise ConfigError("a config says it itself", where=FILE_OPTIONS[field], fix=f"give {field}={value} instead")
    from graft import api

    changes = [*(overrides or [])]
    if vocab_size is not None:
        changes.append(f"data.tokenizer.vocab_size={vocab_size}")
    experiment = api.load(config, changes)
    return experiment.data, experiment.runtime.cache_dir


def _data_of_files(paths: Sequence[str], vocab_size: int | None, given: Mapping[str, Any]) -> DataConfig:
    """Byte-level BPE on files; ``given`` are fields of a config by their dotted names."""
    if vocab_size is None:
        raise ConfigError("--files needs --vocab-size", fix="give the number of ids, e.g. --vocab-size 4096")
    from graft.config.base import DEFER_PROBLEMS
    from graft.config.experiment import DataConfig
    from graft.config.tree import dotted

    fraction = given.get("data.validation.fraction")
    if fraction is not None and not 0 < fraction < 1:
        raise ConfigError(f"{fraction:g} is no share", where="data.validation.fraction", expected="between 0 and 1")
    prefix = "data.source."
    source = {name.removeprefix(prefix): value for name, value in given.items() if name.startswith(prefix)}
    settings = {
        "source": {"type": "files", "path": paths, **source},
        "validation": {"fraction": fraction},
        "tokenizer": {"type": "bpe", "vocab_size": vocab_size},
        "seq_len": 2,
        "max_bad_rows": given.get("data.max_bad_rows", 0),
    }
    data = DataConfig.model_validate(settings, context={DEFER_PROBLEMS: True})
    for problem in data.all_problems():
        raise ConfigError(problem.message, where=f"data.{dotted(problem.path)}", fix=problem.fix)
    return data


def _as_options(text: str) -> str:
    """A message that speaks of the fields of a config, in the options of a command line that has none."""
    for field, option in FILE_OPTIONS.items():
        text = text.replace(field, option)
    return text


@contextmanager
def _options_named() -> Iterator[None]:
    """Errors name options, not fields of a config that nobody gave."""
    try:
        yield
    except GraftError as error:
        where, expected, fix = (text and _as_options(text) for text in (error.where, error.expected, error.fix))
        raise type(error)(_as_options(error.problem), where=where, expected=expected, fix=fix) from error


def _print(report: dict[str, Any]) -> None:
    out = console()
    for side in ("train", "validation"):
        part = report[side]
        out.print(
            f"{side}: {part['bytes']:,} bytes in {part['tokens']:,} tokens = {part['bytes_per_token']:.3f} bytes/token"
        )
    out.print(f"{report['vocab_size']:,} ids, fingerprint {report['fingerprint']}\nwritten to {report['folder']}")
    for line in report["warnings"]:
        out.print(f"warning: {line}", style="yellow")
