"""How fast is a training step of Gemma 3 at 132 million parameters, against Hugging Face's model with the same weights?

Same ids, same clipping. The peer's loops: fp32 with AdamW's defaults; bf16 autocast; bf16 autocast with torch.compile
and fused AdamW.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch

from benchmarks import ours, peers
from benchmarks.timing import Timed, comparison, interleaved, record
from graft.training.runtime import measure_peak_flops, tune_allocator
from graft.training.throughput import flops_per_token

ROWS, SEQ_LEN = 8, 128
STEPS = 4


def run(args: argparse.Namespace) -> None:
    tune_allocator()  # for all of them: it belongs to the process
    ids = ours.random_ids(STEPS, ROWS, SEQ_LEN, 50257)
    experiment = ours.gemma_132m("runtime.compile=true", "precision=bf16", rows=ROWS, seq_len=SEQ_LEN)
    run = ours.trainer(experiment, ids)
    flops = ROWS * SEQ_LEN * flops_per_token(run.model, SEQ_LEN)
    variants: dict[str, Callable[[], float]] = {"graft bf16": ours.stepper(run)}
    fp32 = ours.gemma_132m("runtime.compile=true", "precision=fp32", rows=ROWS, seq_len=SEQ_LEN)
    variants["graft fp32"] = ours.stepper(ours.trainer(fp32, ids))
    for name, settings in {
        "transformers bf16, compiled, fused AdamW": {"bf16": True, "compile": True, "adamw": {"fused": True}},
        "transformers bf16": {"bf16": True},
        "transformers fp32 (default)": {},
    }.items():
        theirs = peers.hugging_face_gemma3(run.model)
        variants[name] = peers.causal_lm_stepper(theirs, ids, **settings)
    timed = interleaved(variants, rounds=args.rounds, warmup=1)
    peaks = {"graft bf16": measure_peak_flops(torch.bfloat16)}
    record("Training step, Gemma 3 132M, 8 x 128", text(timed, flops, peaks))


def text(timed: dict[str, Timed], flops: float, peaks: dict[str, float]) -> str:
    """Tables against both of our variants, and the share of the measured peak."""
    shares = "\n".join(
        f"{name}: {100 * flops / timed[name].median / peak:.0f} % of the measured {peak / 1e9:,.0f} GFLOP/s "
        f"(fastest round {100 * flops / timed[name].fastest / peak:.0f} %)"
        for name, peak in peaks.items()
    )
    return "\n\n".join(
        [
            f"{flops / 1e9:,.0f} GFLOP per step (visible pairs only). Ratios are against graft bf16:",
            comparison(timed, "graft bf16"),
            "Against graft fp32:",
            comparison(
                {name: t for name, t in timed.items() if name in ("graft fp32", "transformers fp32 (default)")},
                "graft fp32",
            ),
            shares,
        ]
    )
