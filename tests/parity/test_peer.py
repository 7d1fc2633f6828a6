"""Our retrieval of experts is PEER-pytorch's, and product-key-memory's where experts are plain values, in fp64.

What maps to what:

- both count experts as ours, ``i_0 · D_1 + i_1``, on a square grid, and have keys [heads, D, axis, C]: keys of its own
  for each head, which here are copies of our one set, so that our gradient is the sum of theirs over the heads;
- queries come axis by axis from theirs, (axis, head, C), and head by head from ours, (head, axis, C);
- PEER-pytorch weighs chosen experts by relu unless ``non_competing_scores=False``: then by softmax, as the paper;
- its norm before the layer is the block's here, and off; neither has our norms of a whole query;
- a product-key memory has values where ours has experts: with relu, and a reading row that gives 1 whatever x is (it
  reads a channel that is always 1), an expert is its writing row. Its layer norm of each half query is taken out.
"""

from __future__ import annotations

import oracles
import pytest
import torch
from layers import context, grad_of, our_layer
from torch import Tensor, nn
from weights import assert_close

from graft.channel_mixers.peer import Peer

B, T, D = 2, 9, 12
AXIS_KEYS, AXIS_DIM, CHOSEN = 7, 5, 6
TOLERANCE = 1e-12
double = torch.float64


def our_peer(heads: int, activation: str, kernels: str) -> Peer:
    """With random weights."""
    peer = {
        "type": "peer",
        "product_key_dims": [AXIS_KEYS, AXIS_KEYS],
        "num_experts_per_tok": CHOSEN,
        "num_heads": heads,
        "query_dim": 2 * AXIS_DIM,
        "query_norm": "none",
        "activation": activation,
    }
    part = our_layer(D, peer, kernels=kernels)
    assert isinstance(part, Peer)
    for parameter in part.parameters():
        nn.init.normal_(parameter, std=0.7)
    return part


def axis_by_axis(rows: Tensor, heads: int) -> Tensor:
    """Rows (head, axis, C) as (axis, head, C)."""
    return rows.unflatten(0, (heads, 2, AXIS_DIM)).transpose(0, 1).flatten(0, 2)


def counterparts(
    ours: Peer, theirs: nn.Module, queries: nn.Linear, tables: dict[str, Tensor], *, grad: bool
) -> dict[str, tuple[Tensor, Tensor]]:
    """Our parameters and theirs, in the shape of theirs; or their gradients, those of keys summed over the heads."""

    of = grad_of if grad else torch.Tensor.detach
    our_keys, their_keys = ours.keys(), of(theirs.keys)
    return {
        "queries": (axis_by_axis(of(ours.query_proj.weight), len(their_keys)), of(queries.weight)),
        "keys": (torch.stack([of(axis) for axis in our_keys], dim=1), their_keys.sum(0) if grad else their_keys),
        **{name: (of(ours.get_parameter(name)), of(table)) for name, table in tables.items()},
    }


def assert_same(
    ours: Peer, theirs: nn.Module, queries: nn.Linear, tables: dict[str, Tensor], *, one: bool = False
) -> None:
    """Outputs and all gradients, with the weights of ours; with ``one`` the first channel of x is always 1."""
    for mine, their in counterparts(ours, theirs, queries, tables, grad=False).values():
        their.copy_(mine)
    xs = [torch.randn(B, T, D - one, dtype=double).requires_grad_()]
    xs.append(xs[0].detach().clone().requires_grad_())
    inputs = [nn.functional.pad(x, (int(one), 0), value=1.0) for x in xs]
    actual, expected = ours(inputs[0], context(inputs[0])).y, theirs(inputs[1])
    assert_close(actual, expected, "output", TOLERANCE)
    direction = torch.randn_like(actual)
    actual.backward(direction)
    expected.backward(direction)
    assert_close(xs[0].grad, xs[1].grad, "gradient of x", TOLERANCE)
    for name, (mine, their) in counterparts(ours, theirs, queries, tables, grad=True).items():
        assert_close(mine, their, f"gradient of {name}", TOLERANCE)


@pytest.mark.parametrize("kernels", ["auto", "reference"])
@pytest.mark.parametrize("heads", [1, 3])
def test_peer(heads: int, kernels: str) -> None:
    ours = our_peer(heads, "gelu", kernels)
    theirs = oracles.peer()(
        D,
        heads=heads,
        num_experts=AXIS_KEYS**2,
        num_experts_per_head=CHOSEN,
        dim_key=AXIS_DIM,
        non_competing_scores=False,
    ).double()
    tables = {"expert_down": theirs.weight_down_embed.weight, "expert_up": theirs.weight_up_embed.weight}
    assert_same(ours, theirs, theirs.to_queries[0], tables)


@pytest.mark.parametrize("kernels", ["auto", "reference"])
@pytest.mark.parametrize("heads", [1, 3])
def test_product_key_memory(heads: int, kernels: str) -> None:
    ours = our_peer(heads, "relu", kernels)
    with torch.no_grad():
        ours.expert_down.copy_(torch.eye(D)[0])
    theirs = oracles.product_key_memory()(D, heads=heads, num_keys=AXIS_KEYS, topk=CHOSEN, dim_head=AXIS_DIM).double()
    theirs.norm = nn.Identity()
    assert_same(ours, theirs, theirs.to_queries, {"expert_up": theirs.values.weight}, one=True)
