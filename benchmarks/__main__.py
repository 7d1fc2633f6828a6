"""``python -m benchmarks [NAME …]``: runs the named benchmarks, or all of them, one after another."""

from __future__ import annotations

import argparse
import importlib
import pkgutil
from pathlib import Path

HERE = Path(__file__).parent
NOT_BENCHMARKS = {"__main__", "timing", "peers", "ours"}


def names() -> list[str]:
    """Every module here with a ``run(args)``."""
    return sorted(m.name for m in pkgutil.iter_modules([str(HERE)]) if m.name not in NOT_BENCHMARKS)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", help=f"any of {', '.join(names())}; none = all")
    parser.add_argument("--rounds", type=int, default=5, help="counted turns of each variant")
    parser.add_argument("--steps", type=int, help="updates, for the benchmarks that train presets; none = their own")
    parser.add_argument("--data", type=Path, help="a text file for the benchmarks that train on one")
    args = parser.parse_args()
    unknown = set(args.names) - set(names())
    if unknown:
        parser.error(f"unknown benchmarks {sorted(unknown)}; known: {', '.join(names())}")
    for name in args.names or names():
        importlib.import_module(f"benchmarks.{name}").run(args)


if __name__ == "__main__":
    main()
