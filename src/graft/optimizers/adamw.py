"""AdamW over parameter groups by role."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

import torch
from torch import nn

from graft.optimizers.adamw_config import AdamWConfig
from graft.optimizers.groups import assert_partition, build_groups, check_overrides, named_trainable


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


def build_adamw(config: AdamWConfig, model: nn.Module) -> torch.optim.AdamW:
    """AdamW for every trainable parameter of ``model``, in groups by role.

    Source: Decoupled Weight Decay Regularization (1711.05101). With g the gradient and t the update's number from 1:
    ``θ ← θ − lr·wd·θ; m ← β₁m + (1−β₁)g; v ← β₂v + (1−β₂)g²; θ ← θ − lr·(m/(1−β₁ᵗ)) / (√(v/(1−β₂ᵗ)) + ε)``.
    Deviation: the decay is multiplied by the whole learning rate, peak included, as everyone since PyTorch does (the
    paper multiplies it by the schedule's factor alone).

    The fused kernel is used where the parameters' device has one; the formula is the same.

    Raises:
        ConfigError: ``optimizer.groups`` names a role the model has none of.
    """
    found = named_trainable(model)
    check_overrides(config, found)
    groups = build_groups(config, found, "adamw", {"betas": config.betas, "eps": config.eps})
    assert_partition(groups, model)
    return torch.optim.AdamW(
        groups,
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=fused_supported(item.parameter for item in found),
    )
