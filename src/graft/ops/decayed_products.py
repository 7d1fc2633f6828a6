"""Products of queries and keys whose channels fade with distance: ``Σ_c q_c · k_c · e^(−rate_c · |i − j|)``.

At any index p between i and j the factor splits into ``e^(−rate·|i − p|) · e^(−rate·|p − j|)``, neither above 1. So
queries against keys that all lie on one side of them are one matrix product of faded queries and faded keys, in which
no exponent can overflow, whatever the rates. Where queries and keys overlap, the queries are halved until few are left,
and those pairs are computed channel by channel.

The plain definition is in `graft.ops.attention_reference`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

NEAR = 16
"""Most queries that are computed channel by channel with the keys among them. Fewer make more and smaller products."""


class Tile(NamedTuple):
    """Queries against keys, both as indices among the keys.

    Args:
        queries: their indices.
        keys: theirs.
        pivot: an index between every query and every key; None where they overlap.
    """

    queries: range
    keys: range
    pivot: int | None


def tiles(queries: range, keys: range, *, causal: bool) -> Iterator[Tile]:
    """Tiles that cover each pair once; with ``causal``, pairs whose key comes after the query may be left out."""
    start, end = queries.start, queries.stop
    before, after = range(keys.start, min(keys.stop, start)), range(max(keys.start, end), keys.stop)
    among = range(max(keys.start, start), min(keys.stop, end))
    if before:
        yield Tile(queries, before, start)
    if after and not causal:
        yield Tile(queries, after, end - 1)
    if among and len(queries) <= NEAR:
        yield Tile(queries, among, None)
    elif among:
        middle = (start + end) // 2
        yield from tiles(range(start, middle), among, causal=causal)
        yield from tiles(range(middle, end), among, causal=causal)


def _fading(rates_H: Tensor, indices: range, others: range) -> Tensor:
    """[n, m, H]: e^(−rate · distance) between each of ``indices`` and each of ``others``."""
    i, j = (torch.arange(r.start, r.stop, device=rates_H.device) for r in (indices, others))
    return torch.exp(-(i[:, None] - j).abs()[..., None] * rates_H)


class _Operands(NamedTuple):
    """The two sides of one tile as batched matrix products, and the factors that were worked in.

    Args:
        q: far tiles [B·K, n·G, H], faded; near tiles [B·K·n, G, H].
        k: far tiles [B·K, m, H], faded; near tiles [B·K·n, m, H], faded for each query.
        q_factor: [n, 1, H]; None in near tiles.
        k_factor: [m, H]; in near tiles [n, m, H].
    """

    q: Tensor
    k: Tensor
    q_factor: Tensor | None
    k_factor: Tensor


def _operands(q: Tensor, k: Tensor, tile: Tile, rates_H: Tensor) -> _Operands:
    """From folded queries [B·K, n·G, H] and keys [B·K, m, H] of a tile. Factors are multiplied in fp32 at least."""
    n, H = len(tile.queries), q.shape[-1]
    if tile.pivot is None:
        factor = _fading(rates_H, tile.queries, tile.keys)
        k_faded = (k[:, None] * factor).to(k.dtype)
        return _Operands(q.reshape(q.shape[0] * n, -1, H), k_faded.flatten(0, 1), None, factor)
    pivot = range(tile.pivot, tile.pivot + 1)
    q_factor, k_factor = _fading(rates_H, tile.queries, pivot), _fading(rates_H, tile.keys, pivot)[:, 0]
    q_faded = (q.unflatten(1, (n, -1)) * q_factor).to(q.dtype).flatten(1, 2)
    return _Operands(q_faded, (k * k_factor).to(k.dtype), q_factor, k_factor)


def _placed(tile: Tile, group: int, first_query: int, first_key: int) -> tuple[slice, slice]:
    """The rows of folded queries and the keys that a tile covers."""
    queries, keys = tile.queries, tile.keys
    rows = slice((queries.start - first_query) * group, (queries.stop - first_query) * group)
    return rows, slice(keys.start - first_key, keys.stop - first_key)


@torch.library.custom_op("graft::decayed_products", mutates_args=())
def decayed_products(
    q: Tensor, k: Tensor, rates_H: Tensor, group: int, first_query: int, first_key: int, causal: bool
) -> Tensor:
    """``Σ_c q_c · k_c · e^(−rate_c · |i − j|)`` of queries and keys with consecutive indices. Once differentiable.

    Args:
        q: [B·K, P·G, H] folded queries: row t·G + g is query t of the g-th head of its group.
        k: [B·K, C, H] keys.
        rates_H: [H] constants ≥ 0.
        group: G.
        first_query: index of query 0, counted as the keys are.
        first_key: index of key 0.
        causal: pairs whose key comes after the query are not needed (they get any finite number).

    Returns:
        [B·K, P·G, C] in the dtype of q.
    """
    rates_H = rates_H.to(torch.promote_types(q.dtype, torch.float32))
    scores = q.new_zeros(q.shape[0], q.shape[1], k.shape[1])
    queries, keys = range(first_query, first_query + q.shape[1] // group), range(first_key, first_key + k.shape[1])
    for tile in tiles(queries, keys, causal=causal):
        rows, columns = _placed(tile, group, first_query, first_key)
        parts = _operands(q[:, rows], k[:, columns], tile, rates_H)
        product = torch.bmm(parts.q, parts.k.transpose(1, 2))
        scores[:, rows, columns] = product.view(q.shape[0], -1, len(tile.keys))
    return scores


@torch.library.custom_op("graft::decayed_products_backward", mutates_args=())
def decayed_products_backward(
    d_scores: Tensor,
    q: Tensor,
    k: Tensor,
    rates_H: Tensor,
    group: int,
    first_query: int,
    first_key: int,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of q and k, in fp32 at least. Those of pairs that `decayed_products` may leave out must be zero."""
    wide = torch.promote_types(q.dtype, torch.float32)
    rates_H = rates_H.to(wide)
    d_q, d_k = torch.zeros_like(q, dtype=wide), torch.zeros_like(k, dtype=wide)
    queries, keys = range(first_query, first_query + q.shape[1] // group), range(first_key, first_key + k.shape[1])
    for tile in tiles(queries, keys, causal=causal):
        rows, columns = _placed(tile, group, first_query, first_key)
        n, m = len(tile.queries), len(tile.keys)
        parts = _operands(q[:, rows], k[:, columns], tile, rates_H)
        d_tile = d_scores[:, rows, columns].reshape(parts.q.shape[0], -1, m)
        from_keys, from_queries = torch.bmm(d_tile, parts.k), torch.bmm(d_tile.transpose(1, 2), parts.q)
        if parts.q_factor is None:
            d_q[:, rows] += from_keys.view(q.shape[0], n * group, -1)
            d_k[:, columns] += (from_queries.view(q.shape[0], n, m, -1) * parts.k_factor).sum(1)
        else:
            d_q[:, rows] += (from_keys.unflatten(1, (n, group)) * parts.q_factor).flatten(1, 2)
            d_k[:, columns] += from_queries * parts.k_factor
    return d_q, d_k


@decayed_products.register_fake
def _(q: Tensor, k: Tensor, *_: object) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[1], k.shape[1])


@decayed_products_backward.register_fake
def _(_d_scores: Tensor, q: Tensor, k: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(q.dtype, torch.float32)
    return torch.empty_like(q, dtype=wide), torch.empty_like(k, dtype=wide)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001 (autograd's signature)
    ctx.save_for_backward(*inputs[:3])
    ctx.settings = inputs[3:]


def _backward(ctx: Any, d_scores: Tensor) -> tuple[Tensor | None, ...]:
    q, k, rates_H = ctx.saved_tensors
    d_q, d_k = decayed_products_backward(d_scores, q, k, rates_H, *ctx.settings)
    return d_q.to(q.dtype), d_k.to(k.dtype), *(None,) * 5


decayed_products.register_autograd(_backward, setup_context=_keep)


def _pair_flops(products: int, q: Any, k: Any, _rates: Any, *settings: Any) -> int:
    """``products`` matrix products over the pairs of all tiles."""
    group, first_query, first_key, causal = settings
    queries, keys = range(first_query, first_query + q[1] // group), range(first_key, first_key + k[1])
    pairs = sum(len(tile.queries) * len(tile.keys) for tile in tiles(queries, keys, causal=causal))
    return products * 2 * q[0] * group * q[2] * pairs


@register_flop_formula(torch.ops.graft.decayed_products)
def _forward_flops(*arguments: Any, **_: Any) -> int:
    """For PyTorch's FLOP counter: the products."""
    return _pair_flops(1, *arguments)


@register_flop_formula(torch.ops.graft.decayed_products_backward)
def _backward_flops(_d_scores: Any, *arguments: Any, **_: Any) -> int:
    """For PyTorch's FLOP counter: the gradients of q and of k."""
    return _pair_flops(2, *arguments)
