"""The ``graft`` command: finds the verbs, runs one, and turns errors into one line and an exit code.

A verb is one file, ``src/graft/cli/<verb>.py``, and nothing else is edited. The rule:

- The file defines ``app = typer.Typer(add_completion=False)``. One ``@app.command()`` makes a plain verb
  (``graft train …``); several make a verb with sub-verbs (``graft data build``). For a single sub-verb also add an
  ``@app.callback()``, or typer folds it into its parent. Docstrings are the help text; the first line is the summary.
- It imports at its top only the standard library, ``typer``, ``graft.errors`` and ``graft.cli._options`` (the shared
  arguments, ``--json`` and the consoles). torch, numpy, rich, configs and the rest of graft are imported inside
  the function that uses them: ``graft --help`` reads every verb, so one heavy import would slow them all (tested).
- It takes ``--json`` and then prints exactly one JSON object to stdout; everything meant for people goes to stderr.
- It raises `GraftError` kinds for whatever a user can cause, and ``typer.Exit(code)`` to end with another exit code. It
  catches nothing just to print it: the rendering is here.
- Files whose name starts with ``_`` are helpers, not verbs.

Exit codes are `graft.errors.ExitCode`; a wrong command line is 2 like a wrong config. ``GRAFT_DEBUG=1`` shows the
traceback of every error. Without a terminal, or with ``NO_COLOR`` set, all output is plain text.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import pkgutil
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import typer
from typer.core import TyperGroup

import graft.cli
from graft.errors import ExitCode, GraftError

_UsageError: type[Exception] = typer.BadParameter.__bases__[0]
"""typer exports only this subclass of "the command line is wrong" (and ships its own copy of click)."""


def verbs() -> list[str]:
    """Names of all verbs, sorted; found by file name, nothing is imported."""
    names = (module.name for module in pkgutil.iter_modules(graft.cli.__path__))
    return sorted(name for name in names if name != "main" and not name.startswith("_"))


def plain_output() -> bool:
    """True when stdout is no terminal or NO_COLOR is set (https://no-color.org)."""
    return bool(os.environ.get("NO_COLOR")) or not sys.stdout.isatty()


class _Verbs(TyperGroup):
    """The top level: loads a verb's module when that verb is asked for."""

    def list_commands(self, ctx: Any) -> list[str]:
        return verbs()

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in verbs():
            return None
        app: typer.Typer = importlib.import_module(f"graft.cli.{cmd_name}").app
        app.rich_markup_mode = self.rich_markup_mode
        command = typer.main.get_command(app)
        command.name = cmd_name
        return command

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and not args[0].startswith("-") and args[0] not in verbs():
            from difflib import get_close_matches

            close = get_close_matches(args[0], verbs(), n=1)
            hint = f"; did you mean '{close[0]}'?" if close else f"; verbs: {', '.join(verbs())}"
            ctx.fail(f"no verb '{args[0]}'{hint}")
        return super().resolve_command(ctx, args)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"graft {version('graft')}")
        raise typer.Exit


def _top() -> _Verbs:
    """The command tree, with ``--version``."""
    app = typer.Typer(add_completion=False, rich_markup_mode=None if plain_output() else "rich")

    @app.callback(cls=_Verbs)
    def graft(
        version: bool = typer.Option(
            False, "--version", callback=_print_version, is_eager=True, help="Show the version."
        ),
    ) -> None:
        """A config-first workbench for language-model architecture research."""

    group = typer.main.get_command(app)
    assert isinstance(group, _Verbs)
    return group


def _fail(message: str, code: int) -> int:
    try:
        sys.stdout.flush()
    except OSError:  # the message is about that, or about something worse
        _discard_stdout()
    with contextlib.suppress(OSError):  # nobody reads errors either: the exit code says it
        print(f"error: {message}", file=sys.stderr)
    return code


def _discard_stdout() -> None:
    """What is still to be written goes nowhere; Python would try again, and complain, when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.__stdout__.fileno() if sys.__stdout__ else 1)


def _reader_went_away() -> int:
    """The other end of the pipe (head, less) has seen enough: nothing is wrong, and there is nobody to tell."""
    _discard_stdout()
    return ExitCode.DONE


def _of_the_machine(error: Exception) -> str | None:
    """What to say when disk or memory refused something and no place knew better; None for any other error."""
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror or error}; free space, change permissions, or name another place"
    if "torch" not in sys.modules and not isinstance(error, MemoryError):
        return None
    from graft.training.memory import allocation_failed

    problem = allocation_failed(error)
    return None if problem is None else f"{problem}; ask for less at once, or use a machine with more"


def _wrong_usage(error: Any) -> int:
    text: str = error.format_message()
    if text.startswith("Usage:"):  # a verb with sub-verbs, called without one: its help is the message
        typer.echo(text, err=True)
        return ExitCode.CONFIG
    command = error.ctx.command_path if error.ctx else "graft"
    return _fail(f"{text.rstrip('.')}; see '{command} --help'", ExitCode.CONFIG)


def _keep_traceback(error: BaseException) -> str:
    """Writes the traceback of an unexpected error to a file; returns where it is."""
    import tempfile
    import traceback

    text = "".join(traceback.format_exception(error))
    try:
        with tempfile.NamedTemporaryFile("w", prefix="graft-error-", suffix=".txt", delete=False) as file:
            file.write(text)
    except OSError:
        return "GRAFT_DEBUG=1 shows the traceback"
    return f"the traceback is in {file.name}"


def _in_plugin(error: BaseException) -> str | None:
    """Where a variant of a person's own was running when an unexpected error came: file and line, or None."""
    import traceback

    from graft.config.registry import plugin_modules

    own = plugin_modules()
    running = traceback.walk_tb(error.__traceback__)
    places = [f"{f.f_code.co_filename}:{line}" for f, line in running if f.f_globals.get("__name__") in own]
    return f"in {places[-1]}, a plug-in" if places else None


def run(arguments: Sequence[str] | None = None) -> int:
    """Runs one command line (default: the process's own) and returns its exit code. Prints errors; raises none.

    With ``GRAFT_DEBUG=1`` the original exception is raised instead.
    """
    debug = os.environ.get("GRAFT_DEBUG") == "1"
    try:
        given = list(sys.argv[1:] if arguments is None else arguments)
        result = _top().main(args=given or ["--help"], prog_name="graft", standalone_mode=False)
        sys.stdout.flush()
        if result == ExitCode.INTERRUPTED:  # typer turns Ctrl-C into this code, silently
            return _fail("interrupted", ExitCode.INTERRUPTED)
        return result if isinstance(result, int) else ExitCode.DONE
    except _UsageError as error:  # wrong options: never worth a traceback
        return _wrong_usage(error)
    except (KeyboardInterrupt, typer.Abort):  # outside a verb; older typers inside one too
        return _fail("interrupted", ExitCode.INTERRUPTED)
    except BrokenPipeError:  # at the last flush
        return _reader_went_away()
    except SystemExit as error:  # typer's answer to a broken pipe inside a verb
        if not isinstance(error.__context__, BrokenPipeError):
            raise
        return _reader_went_away()
    except GraftError as error:
        if debug:
            raise
        return _fail(str(error), error.exit_code)
    except Exception as error:
        if debug:
            raise
        if problem := _of_the_machine(error):
            return _fail(problem, ExitCode.RESOURCES)
        where = _in_plugin(error) or "a bug in graft"
        return _fail(f"{type(error).__name__}: {error} ({where}; {_keep_traceback(error)})", ExitCode.INTERNAL)


def main() -> NoReturn:
    """Entry point of the console script."""
    raise SystemExit(int(run()))
