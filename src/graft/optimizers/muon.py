"""Muon on hidden matrices, AdamW on everything else, as one optimizer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from graft.config.roles import MATRIX_ROLES
from graft.errors import ConfigError
from graft.ops.newton_schulz import newton_schulz
from graft.optimizers.adamw import fused_supported, update_adamw
from graft.optimizers.grouped import GroupedOptimizer, States, Update
from graft.optimizers.groups import (
    Algorithm,
    Group,
    Named,
    assert_partition,
    build_groups,
    check_overrides,
    named_trainable,
)
from graft.optimizers.muon_config import MuonConfig
from graft.optimizers.rowwise import ROW_UPDATES, rowwise_groups

BATCHED_NUMEL = 2**17
"""On a CPU, matrices of at most this many numbers are orthogonalised as one batch; larger ones fill the cores alone and
would only be copied."""

BATCH_BYTES = 256 * 2**20
"""Stacked matrices are split into batches of at most this size, so that the copies stay small beside the model."""


def takes_muon(item: Named) -> bool:
    """Whether a parameter is a hidden matrix, or a batch of them [E, rows, cols] (experts).

    The role decides (embeddings, head, norms, convolutions, routers and banks are not hidden matrices, whatever their
    shape); vectors and matrices with a side of one have nothing to orthogonalise.
    """
    shape = item.parameter.shape
    return item.role in MATRIX_ROLES and len(shape) in (2, 3) and min(shape[-2:]) > 1


def update_scale(scale: Literal["spectral", "match_rms_adamw"], rows: int, cols: int) -> float:
    """The factor on the orthogonalised update of a [rows, cols] matrix.

    spectral: √max(1, rows/cols), from Keller Jordan's post. match_rms_adamw: 0.2·√max(rows, cols), which gives the
    update the root mean square that AdamW's usually has (Moonlight, 2502.16982, section 2.2).
    """
    return max(1.0, rows / cols) ** 0.5 if scale == "spectral" else 0.2 * max(rows, cols) ** 0.5


def update_muon(group: Group, parameters: list[Tensor], states: States) -> None:
    """Muon on hidden matrices.

    Sources: kellerjordan.github.io/posts/muon; decoupled weight decay and match_rms_adamw from Moonlight (2502.16982).
    ``M ← βM + G; U = NS(G + βM) (nesterov) or NS(M); θ ← θ − lr·wd·θ − lr·scale·U``. M is kept in the parameter's dtype
    (fp32), Newton–Schulz runs in ``ns_dtype``.
    Deviation: a 3-D tensor is a batch of matrices (experts), each orthogonalised on its own; a convolution kernel is
    never flattened into a matrix (its role gives it to AdamW).
    """
    momentum, lr = group["momentum"], group["lr"]
    grads = [cast(Tensor, p.grad) for p in parameters]
    for p in parameters:
        if not states[p]:
            states[p]["momentum_buffer"] = torch.zeros_like(p)
    buffers: list[Tensor] = [states[p]["momentum_buffer"] for p in parameters]
    torch._foreach_mul_(buffers, momentum)
    torch._foreach_add_(buffers, grads)
    directions = torch._foreach_add(grads, buffers, alpha=momentum) if group["nesterov"] else tuple(buffers)
    if group["weight_decay"]:
        torch._foreach_mul_(parameters, 1.0 - lr * group["weight_decay"])
    dtype = getattr(torch, group["ns_dtype"])
    for indices in batches(parameters):
        rows, cols = parameters[indices[0]].shape[-2:]
        stacked = directions[indices[0]]
        if len(indices) > 1:
            stacked = torch.stack([directions[i] for i in indices])
        update = newton_schulz(stacked, steps=group["ns_steps"], dtype=dtype)
        factor = -lr * update_scale(group["scale"], rows, cols)
        for i, u_RC in zip(indices, update if len(indices) > 1 else [update], strict=True):
            parameters[i].add_(u_RC, alpha=factor)


def batches(parameters: list[Tensor]) -> Iterator[list[int]]:
    """Indices of the matrices that go through Newton–Schulz together: equal shapes, in order, within `BATCH_BYTES`.

    Small matrices cannot fill the machine one at a time, so one batched product of all is faster. 3-D tensors are
    batches already.
    """
    by_shape: dict[tuple[torch.Size, torch.device], list[int]] = {}
    for i, p in enumerate(parameters):
        if p.ndim == 2 and (p.device.type != "cpu" or p.numel() <= BATCHED_NUMEL):
            by_shape.setdefault((p.shape, p.device), []).append(i)
        else:
            yield [i]
    for indices in by_shape.values():
        first = parameters[indices[0]]
        size = max(1, BATCH_BYTES // (first.numel() * first.element_size()))
        yield from (indices[start : start + size] for start in range(0, len(indices), size))


def build_muon(config: MuonConfig, model: nn.Module) -> GroupedOptimizer:
    """Muon for the hidden matrices of ``model``, AdamW for its other trainable parameters, in groups by role; row-wise
    updates where a role asks for them.

    Raises:
        ConfigError: ``optimizer.groups`` names a role the model has none of, gives Adam settings to a role without any
            AdamW parameter, or a row-wise update that cannot be; or the model has no hidden matrix.
    """
    found = named_trainable(model)
    check_overrides(config, found)
    row_groups, found = rowwise_groups(config, found, model, {"betas": config.betas, "eps": config.eps})
    matrices = [item for item in found if takes_muon(item)]
    others = [item for item in found if not takes_muon(item)]
    if not matrices:
        raise ConfigError(
            "the model has no trainable hidden matrix, so nothing would be updated by Muon",
            where="optimizer.type",
            fix="set optimizer.type: adamw",
        )
    _check_adam_overrides(config, others)
    muon_settings: dict[str, Any] = {
        key: getattr(config, key) for key in ("momentum", "nesterov", "ns_steps", "scale", "ns_dtype")
    }
    adam_settings: dict[str, Any] = {
        "betas": config.betas,
        "eps": config.eps,
        "fused": fused_supported(item.parameter for item in others),
    }
    groups = [
        *build_groups(config, matrices, "muon", muon_settings),
        *build_groups(config, others, "adamw", adam_settings, lr_multiplier=config.adamw_lr_multiplier),
        *row_groups,
    ]
    assert_partition(groups, model)
    updates: dict[Algorithm, Update] = {"muon": update_muon, "adamw": update_adamw, **ROW_UPDATES}
    return GroupedOptimizer(groups, learning_rate=config.learning_rate, updates=updates)


def _check_adam_overrides(config: MuonConfig, others: list[Named]) -> None:
    by_adamw = {item.role for item in others}
    for role, override in config.groups.items():
        if override.update is not None:
            continue
        given = [key for key in ("betas", "eps") if getattr(override, key) is not None]
        if given and role not in by_adamw:
            raise ConfigError(
                f"{given[0]} does nothing here: every parameter of the role '{role}' is updated by Muon",
                where=f"optimizer.groups.{role}.{given[0]}",
                fix=f"remove {given[0]}",
            )
