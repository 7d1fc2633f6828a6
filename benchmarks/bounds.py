"""How fast could a training step be if its matrix products and its update were all there is to it?

Each distinct product of the step is timed by itself, in the fastest layout of its operands, and so is AdamW on the
model's parameters. What the sum allows is as far as faster loops and less overhead could ever get on the machine.
"""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks import gemma_training, ours
from benchmarks.timing import Elsewhere, interleaved, record, table
from benchmarks.utilisation import SHAPES, experiment
from graft.config.experiment import Experiment
from graft.training.matmul import product_seconds
from graft.training.runtime import runtime_restored

FP32 = f"{SHAPES[0]}, fp32"
PEER = "transformers fp32 (default)"
PRODUCTS = {"aten::mm": 0, "aten::bmm": 0, "aten::addmm": 1, "aten::baddbmm": 1}
"""Operations that multiply matrices -> where among their arguments the two factors begin."""

TURNS = 5
"""How often a product is timed per turn; the fastest counts."""


class Least(NamedTuple):
    """Seconds of one step, the fastest seen.

    Args:
        flops: matrix-product FLOPs of a step, visible pairs only.
        step: the whole step.
        products: its matrix products, each by itself.
        update: AdamW by itself.
    """

    flops: float
    step: float
    products: float
    update: float


def run(args: argparse.Namespace) -> None:
    variants = {name: Elsewhere("benchmarks.bounds", "least", name=name) for name in (*SHAPES, FP32)}
    peer = Elsewhere("benchmarks.gemma_training", "transformers", name=PEER)
    rate = Elsewhere("benchmarks.ours", "peak_rate")
    timed = interleaved({PEER: peer, "rate": rate}, rounds=args.rounds)
    found = {name: variant() for name, variant in variants.items()}
    peak, theirs = max(timed["rate"].results), timed[PEER].per(gemma_training.STEPS).fastest
    rows: list[list[str]] = []
    for name, least in found.items():
        floor = least.products + least.update
        shares = (100 * least.flops / seconds / peak for seconds in (least.step, floor, least.products))
        ratios = [theirs / seconds for seconds in (least.step, floor)]
        rows.append(
            [name, *(f"{1000 * s:,.1f}" for s in (least.step, least.products, least.update))]
            + [f"{share:.0f} %" for share in shares]
            + ([f"{ratio:.2f}" for ratio in ratios] if name in (SHAPES[0], FP32) else ["", ""])
        )
    header = ["step", "ms, fastest", "products alone", "AdamW alone", "share of the bf16 rate", "if products and AdamW"]
    header += ["if products alone", "times the peer's fp32 step", "if products and AdamW"]
    record(
        "What matrix products and the update leave",
        f"{table(header, rows)}\n\nThe bf16 rate beside them: {peak / 1e9:,.0f} GFLOP/s. The peer is transformers' "
        f"fp32 step of the first shape with AdamW's defaults: {1000 * theirs:,.0f} ms, its fastest.",
    )
    for variant in (*variants.values(), peer, rate):
        variant.close()


def least(name: str) -> Callable[[], Least]:
    """Measures a shape's step, its products and its update, one after another."""
    given = ours.gemma_132m("runtime.compile=true", "precision=fp32") if name == FP32 else experiment(name)

    def measure() -> Least:
        return _least(given)

    return measure


def _least(given: Experiment) -> Least:
    assert given.model.vocab_size is not None
    rows, seq_len = given.training.global_batch_size, given.data.seq_len
    run = ours.trainer(given, ours.random_ids(4, rows, seq_len, given.model.vocab_size))
    step = ours.stepper(run)
    for _ in range(3):
        step()
    flops = ours.flops_per_step(run)
    whole = _fastest(step, max(TURNS, round(2e12 / flops)))
    dtype = torch.float32 if given.precision == "fp32" else torch.bfloat16
    found = _products_of(step)
    precision = ours.matmul_precision(run)
    with runtime_restored():
        torch.set_float32_matmul_precision(precision)
        products = sum(count * _product_alone(shapes, dtype) for shapes, count in found.items())
    return Least(flops, whole, products, _update_alone(run.parameters))


def _fastest(call: Callable[[], object], turns: int) -> float:
    timed = interleaved({"": call}, rounds=turns)
    return timed[""].fastest


Shapes = tuple[tuple[int, ...], tuple[int, ...]]


def _products_of(step: Callable[[], object]) -> Counter[Shapes]:
    """The shapes of both operands of every product in a step, and how often each occurs."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as recorded:
        step()
    found: Counter[Shapes] = Counter()
    for event in recorded.key_averages(group_by_input_shape=True):
        if event.key in PRODUCTS:
            left, right = event.input_shapes[PRODUCTS[event.key] :][:2]
            found[tuple(left), tuple(right)] += event.count
    return found


def _product_alone(shapes: Shapes, dtype: torch.dtype) -> float:
    """Seconds of the product with its operands in the layout that suits it best."""
    left, right = (torch.randn(shape).to(dtype) for shape in shapes)
    return min(product_seconds(a, b) for a, b in _layouts(left, right) for _ in range(TURNS))


def _layouts(left: Tensor, right: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    yield from product((left, left.mT.contiguous().mT), (right, right.mT.contiguous().mT))


def _update_alone(parameters: list[torch.nn.Parameter]) -> float:
    """Seconds of AdamW's fused kernel on parameters of these sizes."""
    copies = [torch.nn.Parameter(torch.zeros_like(p)) for p in parameters]
    for copy in copies:
        copy.grad = torch.full_like(copy, math.pi)
    return _fastest(torch.optim.AdamW(copies, fused=True).step, TURNS)
