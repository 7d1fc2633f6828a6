"""Arguments that several verbs take, and how they print."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

Config = Annotated[str, typer.Argument(help="Config file: YAML, JSON or TOML; 'presets/…' also finds graft's own.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Changes to the config: model.hidden_size=256 model.blocks.b.0.num_heads=8 …")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout instead of text.")]


def print_json(data: Any) -> None:
    """Prints one JSON object on stdout (the only thing a ``--json`` verb prints there)."""
    typer.echo(json.dumps(data, ensure_ascii=False, allow_nan=False))


def console(*, stderr: bool = False) -> Console:
    """A rich console that is plain without a terminal or with NO_COLOR, and never guesses at markup or numbers."""
    from rich.console import Console

    return Console(stderr=stderr, highlight=False, markup=False, emoji=False, soft_wrap=True)
