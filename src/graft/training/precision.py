"""The numbers a run computes with: fp32 master weights always, matrix work in fp32, bf16 or fp16."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor

from graft.errors import ConfigError

AUTOCAST_DTYPES: dict[Literal["bf16", "fp16"], torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""``precision`` -> what autocast rounds matrix products' inputs to."""

INITIAL_SCALE = 2.0**16
GROWTH_INTERVAL = 2000
"""Good steps in a row after which fp16's loss scale doubles (it halves at each overflow): PyTorch's own default."""

SMALLEST_SCALE = 1.0
"""Below this the scale would push small gradients out of fp16's range instead of keeping them in it."""


def autocast_works(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether ``device`` really autocasts a matrix product to ``dtype``, forward and backward: tried once."""
    x_MK = torch.ones(8, 8, device=device, requires_grad=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an unsupported dtype warns and turns autocast off; the result tells
            with torch.autocast(device.type, dtype=dtype):
                y_MN = x_MK @ x_MK
        y_MN.float().sum().backward()
    except (RuntimeError, TypeError):
        return False
    return y_MN.dtype == dtype


class Precision:
    """Autocast, and fp16's loss scale.

    Source: Mixed Precision Training (1710.03740), sections 3.1 and 3.2; `torch.amp` does the work.
    Parameters, gradients and optimizer state stay fp32. bf16 has fp32's range and needs no scale. fp16 does not: the
    loss is multiplied by a scale S before the backward pass, so that small gradients survive, and the gradients are
    divided by S before anything looks at them.
    Deviations: whether a step overflowed is decided by the caller from the (global) gradient norm, once for every
    rank, and told to `update`; the scale never falls below `SMALLEST_SCALE`, so that a real divergence cannot hide
    behind it.

    Args:
        name: fp32, bf16 or fp16.
        device: where the model is.

    Raises:
        ConfigError: the device cannot autocast to the dtype.
    """

    def __init__(self, name: Literal["fp32", "bf16", "fp16"], device: torch.device):
        self.name = name
        self.device = device
        self.dtype = torch.float32 if name == "fp32" else AUTOCAST_DTYPES[name]
        if name != "fp32" and not autocast_works(device, self.dtype):
            raise ConfigError(
                f"the device '{device}' cannot compute in {name}",
                where="precision",
                expected="fp32, or another device",
                fix="set precision: fp32",
            )
        self._scaler = (
            torch.amp.GradScaler(device.type, init_scale=INITIAL_SCALE, growth_interval=GROWTH_INTERVAL)
            if name == "fp16"
            else None
        )

    def autocast(self) -> AbstractContextManager[Any]:
        """The context of every forward pass (training and evaluation alike)."""
        if self.name == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    @property
    def loss_scale(self) -> float | None:
        """What the loss is multiplied by now; None when nothing is scaled (fp32, bf16)."""
        return None if self._scaler is None else float(self._scaler.get_scale())

    def scale(self, loss: Tensor) -> Tensor:
        """The scalar to call ``backward()`` on: ``loss`` itself without a scale."""
        return loss if self._scaler is None else self._scaler.scale(loss)

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        """Divides the gradients by the scale, once per step, before their norm is taken."""
        if self._scaler is not None:
            self._scaler.unscale_(optimizer)

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Applies finite, unscaled gradients. A step that overflowed must not come here: there is no hidden skip."""
        optimizer.step()

    def update(self, *, overflowed: bool) -> None:
        """Adapts the scale at the end of every step, made or skipped.

        Args:
            overflowed: the step's gradients (or loss) were not finite: the scale is halved. Otherwise it doubles after
                `GROWTH_INTERVAL` such steps in a row.
        """
        if self._scaler is None:
            return
        if not overflowed:
            self._scaler.update()
            return
        halved = max(SMALLEST_SCALE, float(self._scaler.get_scale()) * self._scaler.get_backoff_factor())
        self._scaler.update(new_scale=halved)
        self.load_state_dict({"loss_scale": halved, "good_steps": 0})

    def state_dict(self) -> dict[str, float | int]:
        """``loss_scale`` and ``good_steps`` (made since the scale last changed); empty without a scale."""
        if self._scaler is None:
            return {}
        state = self._scaler.state_dict()
        return {"loss_scale": float(state["scale"]), "good_steps": int(state["_growth_tracker"])}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts back what `state_dict` returned. A run that changes its precision keeps its own start."""
        if self._scaler is None or not state:
            return
        changed = {"scale": state["loss_scale"], "_growth_tracker": state["good_steps"]}
        self._scaler.load_state_dict({**self._scaler.state_dict(), **changed})
