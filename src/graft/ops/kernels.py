"""Kernels of other packages that can stand in for graft's own operations on an accelerator.

They compute the same numbers for whole sequences; decoding is always graft's own. Which part uses which is decided
once, when a model is told how to run (`choose_kernel`), and can be read off the part; nothing is swapped afterwards.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from graft.config.registry import resolve
from graft.errors import ConfigError

Kernels = Literal["auto", "reference"]
"""How graft's own operations compute: in the fastest form that fits, or by the plain definition."""

GRAFT = "graft"
"""What a part is said to use that uses no kernel from elsewhere."""


@dataclass(frozen=True)
class Kernel:
    """A kernel for one kind of part.

    Args:
        name: what ``runtime.kernels`` calls it.
        part: the ``type`` of the parts it can compute.
        operation: ``module:function``; what the function takes and returns is the part's affair.
        package: the module that has to be importable.
        install: what to give to pip for it.
        obstacle: why it cannot compute a given part, or None.
        dtypes: of the operands of matrix products.
        devices: kinds of device it runs on.
    """

    name: str
    part: str
    operation: str
    package: str
    install: str
    obstacle: Callable[[Any], str | None]
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)
    devices: tuple[str, ...] = ("cuda",)

    def reason_against(self, part: Any, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why it cannot be used for ``part`` here, or None."""
        if device.type not in self.devices:
            return f"it runs on {' or '.join(self.devices)}, the model is on {device.type}"
        if dtype not in self.dtypes:
            known = ", ".join(str(d).removeprefix("torch.") for d in self.dtypes)
            return f"it computes in {known}, the run in {str(dtype).removeprefix('torch.')}"
        if importlib.util.find_spec(self.package) is None:
            return f"the package {self.package} is not installed (pip install {self.install!r})"
        return self.obstacle(part)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the operation, which is imported only now."""
        return resolve(self.operation)(*args, **kwargs)


def _head_dims(part: Any) -> str | None:
    """The chunked kernels hold a head's queries in blocks of 16 channels, at most 256."""
    size = part.head_dim
    return f"head_dim {size} is no multiple of 16 up to 256" if size % 16 or size > 256 else None


def _linear_obstacle(part: Any) -> str | None:
    return _one_way(part) or _head_dims(part)


def _one_way(part: Any) -> str | None:
    return None if getattr(part, "causal", True) else "an encoder reads both ways"


def _flex_obstacle(part: Any) -> str | None:
    if part.config.dropout:
        return "it has no dropout of probabilities"
    if part.position.rates(0, torch.device("cpu")) is not None:
        return "channels of its scores fade with distance"
    size = part.head_dim
    return f"head_dim {size} is below 16" if size < 16 else None


_HALF = (torch.bfloat16, torch.float16)
_FLA = Kernel("fla", "retention", "graft.ops.kernels_fla:decay_attention", "fla", "graft[fla]", _linear_obstacle)

KERNELS: tuple[Kernel, ...] = (
    _FLA,
    Kernel("fla", "gla", "graft.ops.kernels_fla:gated_linear_attention", "fla", "graft[fla]", _head_dims),
    Kernel(
        "fla", "gated_deltanet", "graft.ops.kernels_fla:gated_delta_rule", "fla", "graft[fla]", _head_dims, dtypes=_HALF
    ),
    Kernel("mamba_ssm", "mamba2", "graft.ops.kernels_mamba:selective_scan", "mamba_ssm", "graft[mamba]", _one_way),
    Kernel(
        "flex",
        "attention",
        "graft.ops.kernels_flex:flex_attention",
        "torch.nn.attention.flex_attention",
        "torch",
        _flex_obstacle,
    ),
)
"""Every kernel known, the preferred ones first."""


def choose_kernel(
    tag: str | None,
    part: Any,
    asked: str,
    device: torch.device,
    dtype: torch.dtype,
    *,
    kernels: Sequence[Kernel] | None = None,
) -> Kernel | None:
    """The kernel a part shall use; None = graft's own operation.

    Args:
        tag: the part's ``type``.
        part: the part.
        asked: ``runtime.kernels``: ``auto`` takes the first that can be used, ``reference`` none, a name that one.
        device: where the part is.
        dtype: of the operands of its matrix products.
        kernels: to choose from; None = `KERNELS`.

    Raises:
        ConfigError: a kernel is named, is meant for parts like this one, and cannot be used.
    """
    for kernel in KERNELS if kernels is None else kernels:
        if kernel.part != tag or asked not in ("auto", kernel.name):
            continue
        reason = kernel.reason_against(part, device, dtype)
        if reason is None:
            return kernel
        if asked == kernel.name:
            raise ConfigError(
                f"the kernel '{asked}' cannot compute {tag}: {reason}",
                where="runtime.kernels",
                fix="set runtime.kernels: auto, which uses it where it can",
            )
    return None


def require_a_use(asked: str, tags: set[str], *, kernels: Sequence[Kernel] | None = None) -> None:
    """Raises ConfigError when a kernel is named that is meant for none of a model's kinds of parts."""
    known = KERNELS if kernels is None else kernels
    meant = sorted({kernel.part for kernel in known if kernel.name == asked})
    if asked not in ("auto", "reference") and tags.isdisjoint(meant):
        raise ConfigError(
            f"the kernel '{asked}' computes {' and '.join(meant) or 'nothing graft knows'}, the model has none",
            where="runtime.kernels",
            fix="set runtime.kernels: auto",
        )
