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
    memory_bits: arguments.MemoryBits = None,
    memory_group_size: arguments.MemoryGroupSize = None,
    best: arguments.Best = False,
    as_json: Json = False,
) -> None:
    """Pack the ternary layers of a trained model into two bits per weight, or its memory banks into 8 or 4.

    For models trained with bitlinear maps, and for any model with memory banks (see what it costs with graft eval
    --memory-bits). Everything else keeps its precision. generate, chat and eval read the result like any run; it cannot
    be trained further.
    """
    from graft.cost.report import human_bytes
    from graft.training.quantize import quantize_run

    bits = arguments.checked_bits(memory_bits, memory_group_size)
    which = "best" if best else "newest"
    done = quantize_run(run, out, which=which, memory_bits=bits, memory_group_size=memory_group_size)
    if as_json:
        print_json(
            {
                "checkpoint": str(done.checkpoint),
                "step": done.step,
                "layers": list(done.layers),
                "memory_bits": done.memory_bits,
                "bytes_before": done.bytes_before,
                "bytes_after": done.bytes_after,
            }
        )
        return
    sizes = f"{human_bytes(done.bytes_before)} of weights are now {human_bytes(done.bytes_after)}"
    rounded = "" if bits is None else f", memory rounded to {bits} bits"
    console().print(f"{len(done.layers)} layers packed{rounded}, {sizes}: {done.checkpoint}")
