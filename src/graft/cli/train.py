"""``graft train``: from a config file to a trained model in a run directory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graft.cli._options import Config, Json, Overrides, print_json

if TYPE_CHECKING:
    from graft.training.run import Run

app = typer.Typer(add_completion=False)


@app.command()
def train(
    config: Config,
    overrides: Overrides = None,
    out: Annotated[str | None, typer.Option(help="Run directory (default: runtime.output_dir/<id>).")] = None,
    resume: Annotated[
        str, typer.Option(help="auto: continue the run if there is one; never: refuse to; or a checkpoint's folder.")
    ] = "never",
    allow_data_change: Annotated[
        bool, typer.Option("--allow-data-change", help="Resume although the data is not the checkpoint's.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Train a model.

    Ctrl-C or SIGTERM: the step in hand is finished and saved (exit 75); the same command with --resume auto goes on.
    A second one ends the process at once (exit 130); the last checkpoint stays valid.
    """
    import sys

    from graft import api

    experiment = api.load(config, overrides or [])
    run = api.train(
        experiment,
        out=out,
        resume=resume,
        allow_data_change=allow_data_change,
        config_text=as_given(config, overrides or []),
        stream=sys.stderr if as_json else sys.stdout,
    )
    if as_json:
        print_json(summary(run))
    else:
        assert run.directory is not None
        _compare(run.directory)


def _compare(run_dir: Path) -> None:
    """Prints how the run stands beside the untrained model and counting, and where its page is."""
    from graft.report.page import FILE, RunRecord, comparison, comparison_lines

    record = RunRecord.read(run_dir)
    for line in comparison_lines(comparison(record), record.marks):
        typer.echo(line)
    typer.echo(str(run_dir / FILE))


def as_given(config: str, overrides: list[str]) -> str:
    """The config file's text with the command line's overrides as comments; TOML is rewritten as YAML."""
    import io
    import tomllib

    from ruamel.yaml import YAML

    from graft.config.includes import find_config

    path = find_config(config, Path())
    text = path.read_text(encoding="utf-8")
    if path.suffix.lower() == ".toml":
        stream = io.StringIO()
        YAML(typ="safe").dump(tomllib.loads(text), stream)
        text = stream.getvalue()
    return text + "".join(f"\n# overrides: {override}" for override in overrides) + "\n"


def summary(run: Run) -> dict[str, Any]:
    """What ``--json`` prints: where the run is and how well it did."""
    step, numbers = run.last_evaluation or (None, {})
    return {
        "run_directory": str(run.directory),
        "step": run.step,
        "tokens": run.tokens,
        "parameters": run.model.num_parameters(),
        "data_fingerprint": run.prepared.fingerprint,
        "best_loss": run.best_loss,
        **run.marks,
        "evaluation": {"step": step, **numbers},
        "skipped_steps": run.guard.skipped_steps,
        "rollbacks": run.guard.rollbacks,
    }
