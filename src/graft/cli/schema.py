"""``graft schema``: the JSON Schema of config files."""

from __future__ import annotations

from typing import Annotated

import typer

from graft.cli._options import print_json

app = typer.Typer(add_completion=False)


@app.command()
def schema(
    out: Annotated[str | None, typer.Option(help="Write it to this file instead of stdout.")] = None,
    plugin: Annotated[
        list[str] | None, typer.Option(help="Module that registers variants of your own (repeatable).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="With --out, print what was written as JSON.")] = False,
) -> None:
    """Print the JSON Schema of configs, for completion in editors.

    Save it (--out graft.schema.json) and start a config with '# yaml-language-server: $schema=graft.schema.json'.
    """
    import json
    from pathlib import Path

    from graft.config.registry import load_plugins
    from graft.config.schema import config_schema
    from graft.errors import ResourceError

    load_plugins(tuple(plugin or ()))
    data = config_schema()
    if out is None:
        print_json(data)
        return
    try:
        Path(out).write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise ResourceError(f"the schema cannot be written: {error.strerror}", where=out) from error
    if as_json:
        print_json({"out": out})
    else:
        typer.echo(out)
