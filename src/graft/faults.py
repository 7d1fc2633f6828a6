"""Fail-points: places in the code where a test (or a doubting user) can make the process fail on purpose. No torch.

``GRAFT_FAULT="site:step:kind[:rank]"``, several separated by commas, e.g. ``checkpoint.manifest:40:kill`` or
``step:7:nan*:1``. ``site`` is the name given to `fault_point` or `fault_active`; ``step`` a step number or ``*``;
``rank`` the ``RANK`` of the only process that fails. A kind is one of

========  =============================================================================================
raise     raise `InjectedFault`, as a bug would
exit      ``os._exit(1)``: no clean-up of any kind
kill      SIGKILL to this process
term      SIGTERM to this process (what a scheduler sends before it takes a machine away)
sleep     hang; ``sleep=2.5`` for so many seconds (default: an hour)
enospc    raise the operating system's "no space left on device"
corrupt   flip one bit in the middle of the file that was just written
nan, inf  asked for by the code that owns the number: see `fault_active`
========  =============================================================================================

Each fault fires once per process, or every time if its kind ends with ``*``.
"""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from graft.errors import ConfigError

VARIABLE = "GRAFT_FAULT"
"""The environment variable that holds the faults."""

ASKED_KINDS = ("nan", "inf")
"""Kinds that do nothing by themselves: the code that owns the number asks with `fault_active`."""

_DEFAULT_SLEEP_S = 3600.0


class InjectedFault(RuntimeError):
    """What the kind ``raise`` raises. Deliberately no `GraftError`: it stands for a bug."""


@dataclass
class Fault:
    """One entry of the variable; ``step`` and ``rank`` None mean any."""

    text: str
    site: str
    step: int | None
    kind: str
    argument: float | None
    every_time: bool
    rank: int | None
    fired: bool = field(default=False)

    def matches(self, site: str, step: int | None, kinds: tuple[str, ...]) -> bool:
        """Whether this fault is due at ``site`` now."""
        return (
            self.site == site
            and self.kind in kinds
            and (self.step is None or self.step == step)
            and (self.rank is None or self.rank == int(os.environ.get("RANK", "0")))
            and (self.every_time or not self.fired)
        )


class _Plan:
    """The parsed variable, kept as long as its text does not change."""

    text = ""
    faults: tuple[Fault, ...] = ()


def fault_point(site: str, step: int | None = None, *, path: Path | None = None) -> None:
    """Fails here if ``GRAFT_FAULT`` says so; one look at the environment otherwise.

    Args:
        site: name of the place, e.g. ``checkpoint.manifest``.
        step: the training step, where there is one.
        path: the file just written, for the kind ``corrupt``.

    Raises:
        InjectedFault, OSError: as the kinds ``raise`` and ``enospc`` say.
        ConfigError: the variable cannot be read, or asks to corrupt where no file was written.
    """
    fault = _due(site, step, tuple(_ACTIONS))
    if fault is not None:
        _ACTIONS[fault.kind](fault, path)


def fault_active(site: str, step: int | None = None) -> str | None:
    """The asked kind (``nan`` or ``inf``) due at ``site``, or None. Asking uses a one-time fault up."""
    fault = _due(site, step, ASKED_KINDS)
    return fault.kind if fault else None


def reset_faults() -> None:
    """Forgets which faults have fired (for tests that inject into their own process)."""
    _Plan.text, _Plan.faults = "", ()


def _due(site: str, step: int | None, kinds: tuple[str, ...]) -> Fault | None:
    text = os.environ.get(VARIABLE)
    if not text:
        return None
    if text != _Plan.text:
        _Plan.faults = tuple(parse_fault(part) for part in text.split(",") if part.strip())
        _Plan.text = text
    for fault in _Plan.faults:
        if fault.matches(site, step, kinds):
            fault.fired = True
            return fault
    return None


def parse_fault(text: str) -> Fault:
    """Reads one ``site:step:kind[=number][*][:rank]``. Raises ConfigError for anything else: a fault that never fires
    would make a test pass for no reason."""
    parts = text.strip().split(":")
    if len(parts) not in (3, 4) or not parts[0]:
        raise _unreadable(text, "it does not have three or four parts separated by ':'")
    site, step, kind = parts[:3]
    every_time = kind.endswith("*")
    kind, _, argument = kind.removesuffix("*").partition("=")
    if kind not in (*_ACTIONS, *ASKED_KINDS):
        raise _unreadable(text, f"'{kind}' is no kind of fault")
    if argument and kind != "sleep":
        raise _unreadable(text, f"{kind} takes no number")
    try:
        return Fault(
            text=text.strip(),
            site=site,
            step=None if step == "*" else int(step),
            kind=kind,
            argument=float(argument) if argument else None,
            every_time=every_time,
            rank=int(parts[3]) if len(parts) == 4 else None,
        )
    except ValueError:
        raise _unreadable(text, "step, rank and seconds are numbers") from None


def _unreadable(text: str, problem: str) -> ConfigError:
    kinds = ", ".join((*_ACTIONS, *ASKED_KINDS))
    return ConfigError(
        problem,
        where=f"{VARIABLE} '{text.strip()}'",
        expected=f"site:step:kind[:rank] with a kind of {kinds}",
        fix=f"correct or unset {VARIABLE}",
    )


def _raise(fault: Fault, _path: Path | None) -> None:
    raise InjectedFault(f"injected fault {fault.text}")


def _exit(_fault: Fault, _path: Path | None) -> None:
    os._exit(1)


def _kill(_fault: Fault, _path: Path | None) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _term(_fault: Fault, _path: Path | None) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def _sleep(fault: Fault, _path: Path | None) -> None:
    time.sleep(_DEFAULT_SLEEP_S if fault.argument is None else fault.argument)


def _enospc(fault: Fault, _path: Path | None) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), f"injected fault {fault.text}")


def _corrupt(fault: Fault, path: Path | None) -> None:
    if path is None:
        raise _unreadable(fault.text, f"no file is written at {fault.site}")
    middle = path.stat().st_size // 2
    with path.open("r+b") as file:
        file.seek(middle)
        byte = file.read(1)
        file.seek(middle)
        file.write(bytes([byte[0] ^ 1]))


_ACTIONS: dict[str, Callable[[Fault, Path | None], None]] = {
    "raise": _raise,
    "exit": _exit,
    "kill": _kill,
    "term": _term,
    "sleep": _sleep,
    "enospc": _enospc,
    "corrupt": _corrupt,
}
