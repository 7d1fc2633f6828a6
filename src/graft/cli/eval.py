"""``graft eval``: how well a trained model predicts a text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graft.cli import _sampling as arguments
from graft.cli._options import Json, console, print_json
from graft.errors import ConfigError

if TYPE_CHECKING:
    from graft.evals.perplexity import TokenDocument
    from graft.training.load import LoadedRun

app = typer.Typer(add_completion=False)


@app.command("eval")
def evaluate(
    run: arguments.Run,
    text: Annotated[list[str] | None, typer.Option(help="UTF-8 text file, one document; may be repeated.")] = None,
    validation: Annotated[bool, typer.Option("--validation", help="The run's own held-out documents.")] = False,
    context: Annotated[
        int | None, typer.Option(help="Tokens a window reads (default: training length).", min=1)
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(help="Tokens a window moves by (default: half the context); smaller = more context.", min=1),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Windows per forward pass.", min=1)] = 8,
    memory_bits: arguments.MemoryBits = None,
    memory_group_size: arguments.MemoryGroupSize = None,
    best: arguments.Best = False,
    device: arguments.Device = "auto",
    dtype: arguments.Dtype = "fp32",
    as_json: Json = False,
) -> None:
    """Loss per token, perplexity, bits per byte and per character of a text.

    Long documents are read in overlapping windows: every token is scored once, with at least context - stride tokens
    before it (or all there are). The end of each document is scored too, as in training. With --memory-bits the text is
    scored twice, as the model is and with its memory banks rounded.
    """
    if bool(text) == validation:
        raise ConfigError("give either --text or --validation", where="graft eval")
    bits = arguments.checked_bits(memory_bits, memory_group_size)
    from graft.evals.perplexity import text_loss

    loaded = arguments.open_run(run, best=best, device=device, dtype=dtype)
    context = loaded.experiment.data.seq_len if context is None else context
    stride = max(1, context // 2) if stride is None else stride

    def score() -> dict[str, float]:
        return text_loss(
            loaded.model,
            loaded.experiment.objective.build(),
            _documents(loaded, text or []),
            end_of_document=loaded.tokenizer.end_of_document,
            context=context,
            stride=stride,
            batch_size=batch_size,
        ).to_dict()

    report: dict[str, Any] = {"checkpoint": str(loaded.checkpoint), "step": loaded.step}
    report |= {"context": context, "stride": stride, **score()}
    if bits is not None:
        from graft.memories.bank import quantize_banks

        before, after = quantize_banks(loaded.model, bits, memory_group_size)
        report["memory_bytes"] = before
        report["rounded"] = {"memory_bits": bits, "memory_bytes": after, **score()}
    print_json(report) if as_json else _print(report)


def _print(report: Mapping[str, Any], indent: str = "") -> None:
    for name, value in report.items():
        if isinstance(value, dict):
            console().print(f"{name}:")
            _print(value, "  ")
        else:
            number = f"{value:.6g}" if isinstance(value, float) else value
            console().print(f"{indent}{name:<{19 - len(indent)}} {number}")


def _documents(loaded: LoadedRun, files: list[str]) -> Iterable[TokenDocument]:
    from pathlib import Path

    from graft.data.prepare import prepare
    from graft.evals.documents import read_text, stored_documents, text_document

    if files:
        return (text_document(loaded.tokenizer, read_text(Path(name))) for name in files)
    prepared = prepare(loaded.experiment)
    if prepared.tokenizer.fingerprint() != loaded.tokenizer.fingerprint():
        raise ConfigError(
            "the data gives another tokenizer than the run was trained with",
            where="data",
            fix="score a text with --text, or restore the data of the run",
        )
    return stored_documents(prepared.validation, loaded.tokenizer)
