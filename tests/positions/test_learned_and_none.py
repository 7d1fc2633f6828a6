"""Positions added to embeddings."""

from __future__ import annotations

import pytest
import torch

from graft.errors import ConfigError
from graft.initialization import initialize
from graft.part import parameter_roles
from graft.positions.base import AttentionPosition, tables_for
from graft.positions.learned_config import LearnedPositionConfig
from graft.positions.none_config import NoPositionConfig
from graft.positions.rope_config import RopeConfig


def test_learned_rows_are_looked_up_and_start_small():
    module = LearnedPositionConfig(max_seq_len=400).build(32)
    initialize(module, seed=3)
    assert parameter_roles(module) == {"weight": "embedding"}
    out = module(torch.tensor([[0, 399, 7], [7, 7, 1]]))
    assert out.shape == (2, 3, 32)
    assert torch.equal(out[0, 2], out[1, 0])
    assert torch.equal(out[0, 1], module.weight[399])
    assert module.weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_more_positions_than_rows_is_an_error():
    module = LearnedPositionConfig(max_seq_len=4).build(8)
    with pytest.raises(ConfigError, match="no position past 4"):
        module(torch.arange(5)[None])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_none_adds_nothing_to_embeddings_of_any_dtype(dtype):
    x = torch.randn(2, 3, 8).to(dtype)
    y = x + NoPositionConfig().build(8)(torch.zeros(2, 3, dtype=torch.int64))
    assert y.dtype == dtype
    assert torch.equal(x, y)


def test_none_does_nothing_in_attention():
    module, x = NoPositionConfig().build(4, 8), torch.randn(1, 2, 4, 8)
    assert module.encode(x, ()) is x
    assert module.slopes(x.device) is None


def test_shared_tables_are_used_and_missing_ones_computed():
    rope, positions = RopeConfig().build(2, 8), torch.arange(3)[None]
    shared = (torch.ones(1), torch.zeros(1))
    assert tables_for(rope, {rope.table_key: shared}, positions) is shared
    computed = tables_for(rope, {"another": shared}, positions)
    assert torch.equal(computed[0], rope.tables(positions)[0])
    assert tables_for(AttentionPosition(), {}, positions) == ()
