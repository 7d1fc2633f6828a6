"""Which experts a token goes to, and the way there and back.

A token's choices are k experts out of E. A *slot* is one token at one of the experts it chose; there are M = tokens · k
of them, and work is done on slots sorted by expert.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

Scoring = Literal["softmax", "sigmoid"]


def scores(logits: Tensor, scoring: Scoring) -> Tensor:
    """How well each expert suits: ``[..., E] -> [..., E]``. softmax: over the experts; sigmoid: each on its own."""
    return logits.softmax(-1) if scoring == "softmax" else logits.sigmoid()


def choose(suitability: Tensor, num_choices: int, *, num_groups: int = 1, num_groups_kept: int = 1) -> Tensor:
    """The k best experts of each token, best first: ``[..., E] -> [..., k]`` int64.

    With groups (DeepSeek-V3, 2412.19437, section 2.1.2): experts e with the same ``e // (E / num_groups)`` are a group,
    a group is worth the sum of its two best experts, and experts outside the best groups cannot be chosen.

    Args:
        suitability: what is ranked; no gradient comes through.
        num_choices: k.
        num_groups: groups of equal size; 1 = no groups.
        num_groups_kept: groups a token may choose from.
    """
    suitability = suitability.detach()
    if num_groups_kept < num_groups:
        grouped = suitability.unflatten(-1, (num_groups, -1))
        worth = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(-1)
        kept = torch.zeros_like(worth, dtype=torch.bool).scatter(-1, worth.topk(num_groups_kept, dim=-1).indices, True)
        suitability = grouped.masked_fill(~kept[..., None], -torch.inf).flatten(-2)
    return suitability.topk(num_choices, dim=-1).indices


class Slots(NamedTuple):
    """Slots sorted by expert; among those of one expert, tokens keep their order.

    Args:
        order_M: the slot that stands at each place; slot t·k + j is token t at its j-th choice.
        place_M: the place of each slot: the inverse.
        expert_M: the expert at each place.
        ends_E: int32, the place after each expert's last one.
        num_choices: k.
    """

    order_M: Tensor
    place_M: Tensor
    expert_M: Tensor
    ends_E: Tensor
    num_choices: int


def sort_slots(experts: Tensor, num_experts: int) -> Slots:
    """The slots of ``experts`` [tokens, k]."""
    flat_M = experts.flatten()
    expert_M, order_M = flat_M.sort(stable=True)
    places_M = torch.arange(len(flat_M), device=flat_M.device)
    place_M = torch.empty_like(order_M).scatter(0, order_M, places_M)
    ends_E = count(experts, num_experts).cumsum(0).to(torch.int32)
    return Slots(order_M, place_M, expert_M, ends_E, experts.shape[-1])


def count(experts: Tensor, num_experts: int, where: Tensor | None = None) -> Tensor:
    """int64 [E]: how often each expert is in ``experts`` [..., k], where ``where`` [...] is true (None: everywhere)."""
    ones = torch.ones_like(experts) if where is None else where[..., None].expand_as(experts).to(experts.dtype)
    return experts.new_zeros(num_experts).scatter_add_(0, experts.flatten(), ones.flatten())


def spread(x: Tensor, slots: Slots) -> Tensor:
    """``[tokens, D] -> [M, D]``: each token at every place of its slots."""
    return _take_rows(x, slots.order_M // slots.num_choices, slots.place_M)


def collect(y_MD: Tensor, weights: Tensor, slots: Slots) -> Tensor:
    """``[M, D] -> [tokens, D]``: the weighted sum over each token's slots, in fp32 at least.

    Args:
        y_MD: what is at each place.
        weights: [tokens, k], of each choice.
        slots: the places.
    """
    y = _take_rows(y_MD, slots.place_M, slots.order_M).unflatten(0, weights.shape)
    return (y * weights[..., None]).sum(1)


@torch.library.custom_op("graft::take_rows", mutates_args=())
def _take_rows(x: Tensor, source_M: Tensor, place_M: Tensor) -> Tensor:  # noqa: ARG001 (the gradient's)
    """``x[source]`` where each row is taken equally often. Once differentiable.

    The gradient gathers too, through ``place``: where the first taking of row 0 went, then the second, …, then those
    of row 1. Adding up by index, which autograd would do, is slow, and on GPUs in no fixed order.
    """
    return x.index_select(0, source_M)


@_take_rows.register_fake
def _(x: Tensor, source_M: Tensor, place_M: Tensor) -> Tensor:  # noqa: ARG001 (the same arguments)
    return x.new_empty(source_M.shape[0], *x.shape[1:])


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:  # noqa: ARG001 (autograd's signature)
    ctx.save_for_backward(inputs[2])
    ctx.rows = len(inputs[0])


def _backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
    (place_M,) = ctx.saved_tensors
    return d_y.index_select(0, place_M).unflatten(0, (ctx.rows, -1)).sum(1), None, None


_take_rows.register_autograd(_backward, setup_context=_keep)
