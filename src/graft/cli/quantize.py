"""``graft quantize``: a trained ternary model, packed for inference."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from graft.cli import _sampling as arguments
from graft.cli._options import Json, console, print_json

app = typer.Typer(add_completion=False)


@app.command()
def quantize(
    run: arguments.Run,
    out: Annotated[Path, typer.Option(help="The new run directory; must not hold anything.")],
    best: arguments.Best = False,
    as_json: Json = False,
) -> None:
    """Pack the ternary layers of a trained model into two bits per weight.

    For models trained with bitlinear maps. Everything else keeps its precision. generate, chat and eval read the
    result like any run; it cannot be trained further.
    """
    from graft.cost.report import human_bytes
    from graft.training.quantize import quantize_run

    done = quantize_run(run, out, which="best" if best else "newest")
    if as_json:
        print_json(
            {
                "checkpoint": str(done.checkpoint),
                "step": done.step,
                "layers": list(done.layers),
                "bytes_before": done.bytes_before,
                "bytes_after": done.bytes_after,
            }
        )
        return
    sizes = f"{human_bytes(done.bytes_before)} of weights are now {human_bytes(done.bytes_after)}"
    console().print(f"{len(done.layers)} layers packed, {sizes}: {done.checkpoint}")
