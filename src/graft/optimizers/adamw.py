"""AdamW over parameter groups by role."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from graft.optimizers.adamw_config import AdamWConfig
from graft.optimizers.grouped import GroupedOptimizer, States
from graft.optimizers.groups import Group, assert_partition, build_groups, check_overrides, named_trainable
from graft.optimizers.rowwise import ROW_UPDATES, rowwise_groups


@cache
def _kernel_works(device_type: str, dtype: torch.dtype) -> bool:
    probe = torch.zeros(1, device=device_type, dtype=dtype, requires_grad=True)
    probe.grad = torch.zeros_like(probe)
    try:
        torch.optim.AdamW([probe], lr=1e-3, fused=True).step()
    except (RuntimeError, NotImplementedError):
        return False
    return True


def fused_supported(parameters: Iterable[torch.Tensor]) -> bool:
    """Whether PyTorch's fused AdamW kernel takes all of ``parameters``: tried once per device and dtype."""
    return all(_kernel_works(p.device.type, p.dtype) for p in parameters)


def update_adamw(group: Group, parameters: list[Tensor], states: States) -> None:
    """AdamW by PyTorch's own function, fused where ``group["fused"]`` says so.

    Source: Decoupled Weight Decay Regularization (1711.05101). With g the gradient and t the update's number from 1:
    ``θ ← θ − lr·wd·θ; m ← β₁m + (1−β₁)g; v ← β₂v + (1−β₂)g²; θ ← θ − lr·(m/(1−β₁ᵗ)) / (√(v/(1−β₂ᵗ)) + ε)``.
    Deviation: the decay is multiplied by the whole learning rate, peak included, as everyone since PyTorch does (the
    paper multiplies it by the schedule's factor alone).
    """
    for p in parameters:
        if not states[p]:
            device = p.device if group["fused"] else torch.device("cpu")
            states[p]["step"] = torch.zeros((), dtype=torch.float32, device=device)
            states[p]["exp_avg"] = torch.zeros_like(p)
            states[p]["exp_avg_sq"] = torch.zeros_like(p)
    kept: list[dict[str, Any]] = [states[p] for p in parameters]
    adamw(
        parameters,
        [cast(Tensor, p.grad) for p in parameters],
        [s["exp_avg"] for s in kept],
        [s["exp_avg_sq"] for s in kept],
        [],
        [s["step"] for s in kept],
        fused=group["fused"],
        amsgrad=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )


def build_adamw(config: AdamWConfig, model: nn.Module) -> GroupedOptimizer:
    """AdamW for every trainable parameter of ``model``, in groups by role; row-wise updates where a role asks for them.

    Raises:
        ConfigError: ``optimizer.groups`` names a role the model has none of, or a row-wise update that cannot be.
    """
    found = named_trainable(model)
    check_overrides(config, found)
    row_groups, found = rowwise_groups(config, found, model, {"betas": config.betas, "eps": config.eps})
    fused = fused_supported(item.parameter for item in found)
    groups = build_groups(config, found, "adamw", {"betas": config.betas, "eps": config.eps, "fused": fused})
    groups += row_groups
    assert_partition(groups, model)
    return GroupedOptimizer(groups, learning_rate=config.learning_rate, updates={"adamw": update_adamw, **ROW_UPDATES})
