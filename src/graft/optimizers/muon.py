"""Muon on hidden matrices, AdamW on everything else, as one optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from graft.config.roles import MATRIX_ROLES
from graft.errors import ConfigError
from graft.ops.newton_schulz import newton_schulz
from graft.optimizers.adamw import fused_supported
from graft.optimizers.groups import Group, Named, assert_partition, build_groups, check_overrides, named_trainable
from graft.optimizers.muon_config import MuonConfig

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


class Muon(torch.optim.Optimizer):
    """One update of every group, by the algorithm the group names.

    Sources: kellerjordan.github.io/posts/muon; decoupled weight decay and match_rms_adamw from Moonlight (2502.16982).
    For a hidden matrix: ``M ← βM + G; U = NS(G + βM) (nesterov) or NS(M); θ ← θ − lr·wd·θ − lr·scale·U``. M is kept in
    the parameter's dtype (fp32), Newton–Schulz runs in ``ns_dtype``. Everything else gets `graft.optimizers.adamw`'s
    update, fused where the device can.
    Deviation: a 3-D tensor is a batch of matrices (experts), each orthogonalised on its own; a convolution kernel is
    never flattened into a matrix (its role gives it to AdamW).

    Args:
        groups: from `graft.optimizers.groups.build_groups`, with ``algorithm`` "muon" or "adamw".
        learning_rate: the peak.
    """

    def __init__(self, groups: list[Group], *, learning_rate: float):
        super().__init__(groups, {"lr": learning_rate})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One update of every parameter that has a gradient.

        Args:
            closure: recomputes the loss with gradients, as in every torch optimizer; rarely used.

        Returns:
            The closure's loss, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters: list[Tensor] = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            if group["algorithm"] == "muon":
                self._step_muon(group, parameters)
            else:
                self._step_adamw(group, parameters)
        return loss

    def _step_muon(self, group: Group, parameters: list[Tensor]) -> None:
        momentum, lr = group["momentum"], group["lr"]
        grads = [cast(Tensor, p.grad) for p in parameters]
        for p in parameters:
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        buffers: list[Tensor] = [self.state[p]["momentum_buffer"] for p in parameters]
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

    def _step_adamw(self, group: Group, parameters: list[Tensor]) -> None:
        for p in parameters:
            if not self.state[p]:
                device = p.device if group["fused"] else torch.device("cpu")
                self.state[p]["step"] = torch.zeros((), dtype=torch.float32, device=device)
                self.state[p]["exp_avg"] = torch.zeros_like(p)
                self.state[p]["exp_avg_sq"] = torch.zeros_like(p)
        states: list[dict[str, Any]] = [self.state[p] for p in parameters]
        adamw(
            parameters,
            [cast(Tensor, p.grad) for p in parameters],
            [s["exp_avg"] for s in states],
            [s["exp_avg_sq"] for s in states],
            [],
            [s["step"] for s in states],
            fused=group["fused"],
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


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


def build_muon(config: MuonConfig, model: nn.Module) -> Muon:
    """Muon for the hidden matrices of ``model``, AdamW for its other trainable parameters, in groups by role.

    Raises:
        ConfigError: ``optimizer.groups`` names a role the model has none of, or gives Adam settings to a role without
            any AdamW parameter; or the model has no hidden matrix.
    """
    found = named_trainable(model)
    check_overrides(config, found)
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
    ]
    assert_partition(groups, model)
    return Muon(groups, learning_rate=config.learning_rate)


def _check_adam_overrides(config: MuonConfig, others: list[Named]) -> None:
    by_adamw = {item.role for item in others}
    for role, override in config.groups.items():
        given = [key for key in ("betas", "eps") if getattr(override, key) is not None]
        if given and role not in by_adamw:
            raise ConfigError(
                f"{given[0]} does nothing here: every parameter of the role '{role}' is updated by Muon",
                where=f"optimizer.groups.{role}.{given[0]}",
                fix=f"remove {given[0]}",
            )
