"""Keeping long loops out of compiled graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar, cast

import torch

Given = ParamSpec("Given")
Result = TypeVar("Result")


def outside_graphs(run: Callable[Given, Result]) -> Callable[Given, Result]:
    """``run``, to be called between the graphs when a caller is being compiled.

    For loops whose turns grow with the length: unrolled into a graph they would take minutes to compile. It is decided
    at the call, because PyTorch's decorator imports the whole compiler.
    """
    if not torch.compiler.is_compiling():
        return run
    return cast(Callable[Given, Result], torch.compiler.disable(run))
