"""``graft parts``: the variants a config can name, with their fields."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from graft.cli._options import Json, console, print_json

if TYPE_CHECKING:
    from graft.config.describe import FieldDoc, VariantDoc

app = typer.Typer(add_completion=False)


@app.command()
def parts(
    name: Annotated[str | None, typer.Argument(help="A family (norm), a type (attention), or family.type.")] = None,
    plugin: Annotated[
        list[str] | None, typer.Option(help="Module that registers variants of your own (repeatable).")
    ] = None,
    as_json: Json = False,
    markdown: Annotated[
        bool, typer.Option(help="Print the page docs/parts.md: every part at one shape, with its cost.")
    ] = False,
    measured: Annotated[
        Path | None, typer.Option(help="With --markdown: speeds, as `python -m benchmarks parts_table` writes them.")
    ] = None,
) -> None:
    """List the variants of every family, or the fields of one."""
    from graft.config.describe import all_variants, matching
    from graft.config.registry import PACKAGES, load_plugins
    from graft.errors import ConfigError

    load_plugins(tuple(plugin or ()))
    if markdown:
        _print_page(measured, other_arguments=name is not None or as_json)
        return
    if measured is not None:
        raise ConfigError("--measured adds columns to the page", fix="give --markdown as well")
    found = all_variants() if name is None else matching(name)
    if not found:
        from difflib import get_close_matches

        known = [*PACKAGES, *(v.type for v in all_variants())]
        close = get_close_matches(name or "", known, n=1)
        fix = f"did you mean '{close[0]}'?" if close else f"families: {', '.join(PACKAGES)}"
        raise ConfigError(f"'{name}' is no family and no type", fix=fix)
    if as_json:
        print_json({"variants": [variant.to_dict() for variant in found]})
    elif name is None or name in PACKAGES:
        _print_list(found)
    else:
        for variant in found:
            _print_fields(variant)


def _print_page(measured: Path | None, *, other_arguments: bool) -> None:
    from graft.cost.parts_table import Measured, parts_markdown
    from graft.errors import ConfigError

    if other_arguments:
        raise ConfigError("--markdown prints one page of all parts", fix="leave out the name and --json")
    speeds = None
    if measured is not None:
        try:
            speeds = Measured.from_json(measured.read_text(encoding="utf-8"))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"no speeds can be read: {error}",
                where=str(measured),
                expected="what `python -m benchmarks parts_table` writes",
            ) from error
    typer.echo(parts_markdown(speeds), nl=False)


def _print_list(found: list[VariantDoc]) -> None:
    out = console()
    family = None
    width = max(len(variant.type) for variant in found)
    for variant in found:
        if variant.family != family:
            family = variant.family
            out.print(family, style="bold")
        out.print(f"  {variant.type:<{width}}  {variant.summary}")


def _print_fields(variant: VariantDoc) -> None:
    out = console()
    out.print(f"{variant.type} ({variant.family})", style="bold")
    out.print(f"{variant.doc}\n")
    for entry in variant.fields:
        out.print(f"  {entry.name}: {_traits(entry)}")
        out.print(f"      {entry.doc}")
    out.print("")


def _traits(entry: FieldDoc) -> str:
    from graft.config.describe import plain_value

    default = "required" if entry.required else f"default {plain_value(entry.default)}"
    only_if = f"only if {entry.only_if}" if entry.only_if else None
    return "; ".join(part for part in (entry.type, entry.range, default, only_if) if part)
