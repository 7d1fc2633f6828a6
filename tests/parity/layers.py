"""One layer of ours with an oracle's weights, copied by name, and both compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from weights import assert_close, randomize

from graft.config.model import ModelConfig
from graft.model import build_model
from graft.part import Context, Part


def as_it_is(name: str, tensor: Tensor) -> Tensor:
    return tensor


@dataclass(frozen=True)
class Layers:
    """A layer of each.

    Args:
        ours: in fp64.
        theirs: in fp64.
        our_name: their parameter's name to ours.
        our_form: their tensor (a parameter of that name, or its gradient) as ours has it.
    """

    ours: Part
    theirs: nn.Module
    our_name: Callable[[str], str]
    our_form: Callable[[str, Tensor], Tensor] = as_it_is

    def copy_weights(self) -> None:
        """Random weights for theirs and ours; asserts that no parameter on either side is left out."""
        randomize(self.theirs)
        copied = {self.our_name(name): self.our_form(name, p) for name, p in self.theirs.named_parameters()}
        mine = dict(self.ours.named_parameters())
        assert copied.keys() == mine.keys()
        with torch.no_grad():
            for name, parameter in mine.items():
                parameter.copy_(copied[name])

    def assert_same(self, x_BTD: Tensor, run: Callable[[Tensor], Tensor], tolerance: float) -> None:
        """Outputs of ours and of ``run``, which calls theirs, and the gradients of x and of all parameters."""
        self.copy_weights()
        xs = [x_BTD.detach().clone().requires_grad_() for _ in range(2)]
        actual, expected = self.ours(xs[0], context(x_BTD)).y, run(xs[1])
        assert expected.dtype == torch.float64
        assert_close(actual, expected, "output", tolerance)
        direction = torch.randn_like(actual)
        actual.backward(direction)
        expected.backward(direction)
        assert_close(grad_of(xs[0]), grad_of(xs[1]), "gradient of x", tolerance)
        for name, parameter in self.theirs.named_parameters():
            mine = grad_of(self.ours.get_parameter(self.our_name(name)))
            assert_close(mine, self.our_form(name, grad_of(parameter)), f"gradient of {name}", tolerance)


def our_layer(
    hidden_size: int, mixer: dict[str, Any], *, kernels: Any = "auto", eps: float = 1e-2, bidirectional: bool = False
) -> Part:
    """A part of a model of width ``hidden_size`` by itself, in fp64."""
    norm = {"type": "rms_norm", "eps": eps}
    config = {"hidden_size": hidden_size, "num_layers": 1, "norm": norm, "blocks": {"layer": [mixer]}}
    config["bidirectional"] = bidirectional
    model = build_model(ModelConfig.model_validate(config), 7, seed=0, dtype=torch.float64)
    model.set_runtime(kernels=kernels)
    part = model.get_submodule(f"layers.0.{mixer['type']}.part")
    assert isinstance(part, Part)
    return part


def context(x_BTD: Tensor) -> Context:
    """One document per row."""
    B, T, _ = x_BTD.shape
    return Context(torch.zeros(B, T, dtype=torch.int64), torch.arange(T).expand(B, T))


def grad_of(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad
