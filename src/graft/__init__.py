"""A config-first workbench for language-model architecture research.

``graft.load``, ``graft.build``, ``graft.train`` and ``graft.generate`` are the functions of `graft.api`; it is imported
when one of them is first used, so that ``import graft`` (and ``graft --help``) stay free of torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graft.api import build as build
    from graft.api import generate as generate
    from graft.api import load as load
    from graft.api import train as train

__all__ = ["build", "generate", "load", "train"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'graft' has no attribute '{name}'")
    from graft import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
