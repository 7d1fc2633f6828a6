"""``graft diff``: where two configs differ."""

from __future__ import annotations

from typing import Annotated

import typer

from graft.cli._options import Json, console, print_json

app = typer.Typer(add_completion=False)

_Config = Annotated[str, typer.Argument(help="Config file.")]


@app.command()
def diff(a: _Config, b: _Config, as_json: Json = False) -> None:
    """Compare two configs, defaults written out, and say whether they are the same run."""
    from graft.config.describe import plain_value
    from graft.config.identity import config_diff, run_id, semantic_hash
    from graft.config.load import load_experiment

    left, right = load_experiment(a), load_experiment(b)
    found = config_diff(left, right)
    same = semantic_hash(left) == semantic_hash(right)
    if as_json:
        differences = [{"path": path, "a": x, "b": y} for path, x, y in found]
        print_json({"a": run_id(left), "b": run_id(right), "same_run": same, "differences": differences})
        return
    out = console()
    for path, x, y in found:
        out.print(f"{path}: {plain_value(x)} -> {plain_value(y)}")
    verdict = "the same numbers" if same else "different runs"
    out.print(f"{run_id(left)} and {run_id(right)}: {verdict}", style="bold")
