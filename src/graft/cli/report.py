"""``graft report``: a run as one HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from graft.cli._options import Json, console, print_json

app = typer.Typer(add_completion=False)


@app.command()
def report(run: Annotated[Path, typer.Argument(help="Run directory.")], as_json: Json = False) -> None:
    """Write report.html into a run directory: curves, baselines, samples, config, environment."""
    from graft.report.page import RunRecord, comparison, comparison_lines, write_report

    path = write_report(run)
    record = RunRecord.read(run)
    scores = comparison(record)
    if as_json:
        print_json({"report": str(path), **record.marks, "bits_per_byte": scores})
        return
    out = console()
    for line in comparison_lines(scores, record.marks):
        out.print(line)
    out.print(str(path))
