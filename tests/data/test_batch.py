"""The micro-batch."""

from __future__ import annotations

import torch

from graft.data.batch import Batch


def test_to_moves_every_tensor_and_keeps_the_rest() -> None:
    ids = torch.arange(6).reshape(2, 3)
    batch = Batch(ids, ids + 1, torch.ones_like(ids), ids, 5, 17, (3, 9))
    moved = batch.to("meta")
    tensors = (moved.input_ids_BT, moved.targets_BT, moved.segment_ids_BT, moved.positions_BT)
    assert all(tensor is not None and tensor.device.type == "meta" for tensor in tensors)
    assert (moved.num_targets, moved.num_bytes, moved.sample_ids) == (5, 17, (3, 9))
    assert moved.num_positions == 6
    assert batch.input_ids_BT.device.type == "cpu"


def test_to_keeps_absent_tensors_absent() -> None:
    ids = torch.zeros(1, 2, dtype=torch.int64)
    moved = Batch(ids, ids, None, None, 2, 2, (0,)).to("cpu")
    assert moved.segment_ids_BT is None
    assert moved.positions_BT is None
