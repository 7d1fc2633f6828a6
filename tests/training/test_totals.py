"""Sums, denominators and the means people read."""

from __future__ import annotations

import math

import pytest
import torch

from graft.data.batch import Batch
from graft.training.totals import Totals


def batch(targets, num_bytes, shape=(2, 4)):
    ids = torch.zeros(shape, dtype=torch.int64)
    return Batch(ids, ids, None, None, num_targets=targets, num_bytes=num_bytes, sample_ids=(0, 1))


def test_denominators_are_sums_over_the_micro_batches():
    totals = Totals.of([batch(3, 5), batch(8, 9, (1, 8))])
    assert (totals.num_targets, totals.num_bytes, totals.num_positions) == (11, 14, 16)
    assert totals.sums == {}


def test_means_are_per_target_and_bits_per_byte_follow_from_the_cross_entropy_alone():
    totals = Totals(num_targets=4, num_bytes=10, num_positions=8)
    totals.add({"ce": torch.tensor(8.0), "z_loss": torch.tensor(2.0), "aux": torch.tensor(4.0)})
    means = totals.means()
    assert means["loss"] == 2.0
    assert means["perplexity"] == pytest.approx(math.exp(2.0))
    assert means["bpb"] == pytest.approx(8.0 / math.log(2.0) / 10)
    assert means["z_loss"] == 0.5
    assert means["aux"] == 0.5


def test_merging_equals_summing_at_once_even_where_single_precision_would_round():
    parts = [Totals(1, 1, 1, {}) for _ in range(3)]
    for part, value in zip(parts, (2.0**24, 1.0, 1.0), strict=True):
        part.add({"ce": torch.tensor(value)})
    merged = Totals()
    for part in parts:
        merged.merge(part)
    assert merged.means()["loss"] == (2**24 + 2) / 3
    assert merged.num_targets == 3


def test_without_targets_or_bytes_there_is_no_number():
    assert Totals().means() == {"loss": None, "perplexity": None, "bpb": None}
    no_bytes = Totals(num_targets=1, num_bytes=0, num_positions=1)
    no_bytes.add({"ce": torch.tensor(1.0)})
    assert no_bytes.means()["bpb"] is None


def test_a_loss_too_large_for_its_exponential_is_still_a_number():
    totals = Totals(num_targets=1, num_bytes=1, num_positions=1)
    totals.add({"ce": torch.tensor(5000.0)})
    assert math.isfinite(totals.means()["perplexity"])


def test_state_comes_back():
    totals = Totals(4, 10, 8)
    totals.add({"ce": torch.tensor(8.25)})
    assert Totals.from_state(totals.state_dict(), torch.device("cpu")) == totals


def test_counts_add_up_and_come_back():
    totals = Totals(4, 10, 8)
    totals.count({"layers.0.moe.experts": torch.tensor([1, 2])})
    totals.merge(Totals(usage={"layers.0.moe.experts": torch.tensor([3, 0])}))
    assert totals.usage["layers.0.moe.experts"].tolist() == [4, 2]
    read = Totals.from_state(totals.state_dict(), torch.device("cpu"))
    assert read.usage["layers.0.moe.experts"].tolist() == [4, 2]
