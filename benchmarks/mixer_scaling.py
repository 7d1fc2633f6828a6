"""Does the cost of training a recurrent mixer grow in proportion to the length?

One layer of each, forward and backward, fp32, one sequence. The exponent is that of the least processor time against
the length, fitted over all lengths (least squares of the logarithms).
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Mapping

import torch

from benchmarks.timing import Timed, interleaved, record, table
from graft.cost.parts_table import VOCAB_SIZE, common_part, one_layer
from graft.model import Model, build_model
from graft.training.runtime import tune_allocator

LENGTHS = (512, 1024, 2048, 4096, 8192)
MIXERS = ("retention", "mamba2", "gla", "gated_deltanet", "titans")


def layer_pass(model: Model, length: int) -> Callable[[], None]:
    """One forward and backward pass over a sequence."""
    ids_1T = torch.randint(VOCAB_SIZE, (1, length), generator=torch.Generator().manual_seed(0))

    def call() -> None:
        model.zero_grad(set_to_none=True)
        model.features(ids_1T).x_BTD.square().sum().backward()

    return call


def exponent(seconds: Mapping[int, float]) -> float:
    """p of the power law seconds ∝ length^p that fits best."""
    points = [(math.log(length), math.log(value)) for length, value in seconds.items()]
    slope, _ = statistics.linear_regression(*zip(*points, strict=True))
    return slope


def least(timed: Mapping[str, Timed]) -> dict[int, float]:
    """Length -> least processor seconds."""
    return {int(length): min(t.cpu_seconds) for length, t in timed.items()}


def run(args: argparse.Namespace) -> None:
    tune_allocator()  # as every training run does: fresh pages for ever larger tensors are not the mixer's cost
    rows = []
    for mixer in MIXERS:
        model = build_model(one_layer(common_part("token_mixer", mixer)), VOCAB_SIZE, seed=0)
        passes = {str(length): layer_pass(model, length) for length in LENGTHS}
        seconds = least(interleaved(passes, rounds=min(3, args.rounds)))
        rows.append([mixer, *(f"{1000 * s:,.0f}" for s in seconds.values()), f"{exponent(seconds):.2f}"])
    record(
        "Training cost against the length",
        "One layer of width 512 alone, one sequence, fp32, forward and backward: least processor time in ms.\n\n"
        + table(["mixer", *(f"T = {length:,}" for length in LENGTHS), "exponent"], rows),
    )
