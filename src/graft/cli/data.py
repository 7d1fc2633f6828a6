"""``graft data``: tokenise the text of a config, and look at what came of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from graft.cli._options import Config, Json, Overrides, console, print_json

if TYPE_CHECKING:
    from graft.config.experiment import Experiment
    from graft.data.prepare import PreparedData

app = typer.Typer(add_completion=False)


@app.callback()
def data() -> None:
    """Tokenise the text of a config, and look at what came of it."""


@app.command()
def build(config: Config, overrides: Overrides = None, as_json: Json = False) -> None:
    """Tokenise the data of a config into the cache (training does the same when it starts)."""
    from graft.data.inspect import describe

    experiment, prepared = _prepare(config, overrides)
    found = describe(prepared, experiment)
    if as_json:
        print_json(found)
    else:
        _print_counts(found)


@app.command()
def inspect(
    config: Config,
    overrides: Overrides = None,
    samples: Annotated[int, typer.Option(help="Decoded training rows to show.", min=0)] = 2,
    as_json: Json = False,
) -> None:
    """Show counts, document lengths, packing efficiency, shards and decoded rows; checks every shard."""
    from graft.data import inspect as inspection
    from graft.data.store import TokenStore

    experiment, prepared = _prepare(config, overrides)
    for store in (prepared.train, prepared.validation):
        TokenStore.open(store.folder, verify=True)
    found = inspection.inspect(prepared, experiment, samples=samples)
    if as_json:
        print_json(found)
        return
    _print_counts(found)
    _print_lengths(found)
    out = console()
    for side in ("train", "validation"):
        for shard in found[side]["shards"]:
            out.print(f"{shard['file']}: {shard['tokens']:,} tokens, {shard['hash']}")
    for number, text in enumerate(found["samples"]):
        out.print(f"\n--- row {number} of epoch 0 ({inspection.BORDER} = a document begins) ---\n{text}")


def _prepare(config: str, overrides: list[str] | None) -> tuple[Experiment, PreparedData]:
    from graft import api
    from graft.data.prepare import prepare

    experiment = api.load(config, overrides or [])
    return experiment, prepare(experiment)


def _print_counts(found: dict[str, Any]) -> None:
    from rich.table import Table

    table = Table("", "train", "validation")
    for name in ("documents", "tokens", "bytes", "bytes_per_token", "rows", "packing_efficiency"):
        cells = (found[side][name] for side in ("train", "validation"))
        table.add_row(name, *(f"{cell:,.4g}" if isinstance(cell, float) else f"{cell:,}" for cell in cells))
    out = console()
    out.print(table)
    out.print(f"vocabulary: {found['vocab_size']:,} ids   row: {found['seq_len']:,} tokens")
    skipped = ", ".join(f"{count} x {cause}" for cause, count in found["skipped"].items()) or "none"
    out.print(f"skipped rows: {skipped}")
    for row in found["first_skipped"]:
        out.print(f"  {row}")
    out.print(f"fingerprint: {found['fingerprint']}\nfolder: {found['folder']}")
    for line in found["warnings"]:
        out.print(f"warning: {line}", style="yellow")


def _print_lengths(found: dict[str, Any]) -> None:
    from rich.table import Table

    table = Table("tokens in a document", "train", "validation")
    counts = {
        side: {(part["from"], part["to"]): part["documents"] for part in found[side]["lengths"]}
        for side in ("train", "validation")
    }
    for low, high in sorted({*counts["train"], *counts["validation"]}):
        cells = (counts[side].get((low, high), 0) for side in ("train", "validation"))
        table.add_row(f"{low:,} - {high:,}", *(f"{cell:,}" for cell in cells))
    console().print(table)
