"""``graft check``: is a config valid, and what does it cost."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graft.cli._options import Config, Json, Overrides, console, print_json
from graft.errors import ConfigError, ExitCode

if TYPE_CHECKING:
    from graft.config.experiment import Experiment
    from graft.contracts.registry import Verdict

app = typer.Typer(add_completion=False)


@app.command()
def check(
    config: Config,
    overrides: Overrides = None,
    static: Annotated[bool, typer.Option("--static", help="Only read and validate: no torch, no price.")] = False,
    contracts: Annotated[
        bool, typer.Option("--contracts", help="Also examine the model: causality, documents, decoding, gradients, …")
    ] = False,
    as_json: Json = False,
) -> None:
    """Validate a config, and price it: parameters, FLOPs, memory, decode state."""
    if static and contracts:
        fix = "give one; --contracts builds the model and runs it, and --static only reads the config"
        raise ConfigError("--static and --contracts exclude each other", where="graft check", fix=fix)
    from graft.config.load import load_experiment

    try:
        experiment = load_experiment(config, overrides or ())
        report, text, advice = _report(experiment, static=static)
    except ConfigError as error:
        if not as_json:
            raise
        print_json({"valid": False, "errors": _errors(error)})
        raise typer.Exit(error.exit_code) from None
    verdicts = _examine(experiment) if contracts else []
    if contracts:
        report["contracts"] = [asdict(verdict) for verdict in verdicts]
    if as_json:
        print_json(report)
    else:
        out = console()
        out.print(f"{report['id']}: valid\n{text}")
        for verdict in verdicts:
            word = "broken" if verdict.problem else "holds"
            out.print(f"{word:<7} {verdict.contract}: {verdict.problem or verdict.claim}")
        for line in advice:
            out.print(f"warning: {line}", style="yellow")
    if any(verdict.problem for verdict in verdicts):
        raise typer.Exit(ExitCode.INTERNAL)


def _report(experiment: Experiment, *, static: bool) -> tuple[dict[str, Any], str, list[str]]:
    """What is printed as JSON, the text, and the advice below it. Raises ConfigError when no model can be built."""
    report = _facts(experiment)
    advice: list[str] = report["warnings"]
    if static:
        return report, f"{report['max_steps']} steps of {report['tokens_per_step']} tokens", advice
    from graft.cost import price

    cost = price(experiment)
    return report | {**cost.to_dict(), "warnings": [*advice, *cost.warnings]}, cost.render(), advice


def _errors(error: ConfigError) -> list[dict[str, Any]]:
    from graft.config.report import ConfigProblems

    if isinstance(error, ConfigProblems):
        return error.to_json()
    # what only building the model shows has no line of its own
    fix = "; ".join(filter(None, (error.expected and f"expected {error.expected}", error.fix))) or None
    return [{"file": None, "line": None, "col": None, "path": error.where, "problem": error.problem, "fix": fix}]


def _examine(experiment: Experiment) -> list[Verdict]:
    from graft.contracts.registry import examine
    from graft.contracts.subject import Subject

    return examine(Subject.of(experiment))


def _facts(experiment: Experiment) -> dict[str, Any]:
    from graft.config.advice import warnings
    from graft.config.identity import run_id, semantic_hash

    return {
        "valid": True,
        "id": run_id(experiment),
        "hash": semantic_hash(experiment),
        "max_steps": experiment.max_steps,
        "tokens_per_step": experiment.tokens_per_step,
        "warnings": warnings(experiment),
    }
