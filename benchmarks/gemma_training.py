"""How fast is a training step of Gemma 3 at 132 million parameters, against Hugging Face's model with the same weights?

Same ids, same clipping. The peer's loops: fp32 with AdamW's defaults; bf16 autocast; bf16 autocast with torch.compile
and fused AdamW. Each side runs in a process of its own, in turn, because memory allocation is one of the differences.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

from benchmarks import ours, peers
from benchmarks.timing import Elsewhere, Timed, comparison, interleaved, record
from graft.model import build_model
from graft.training.throughput import flops_per_token

ROWS, SEQ_LEN, VOCAB = 8, 128, 50257
PEERS = {
    "transformers bf16, compiled, fused AdamW": {"bf16": True, "compile": True, "adamw": {"fused": True}},
    "transformers bf16": {"bf16": True},
    "transformers fp32 (default)": {},
}


def run(args: argparse.Namespace) -> None:
    here = "benchmarks.gemma_training"
    variants = {f"graft {p}": Elsewhere(here, "graft", precision=p) for p in ("bf16", "fp32")}
    variants |= {name: Elsewhere(here, "transformers", name=name) for name in PEERS}
    variants["peak bf16"] = Elsewhere("benchmarks.ours", "peak_rate")
    timed = interleaved(variants, rounds=args.rounds, warmup=2)
    peak = float(variants["peak bf16"]())
    for variant in variants.values():
        variant.close()
    del timed["peak bf16"]
    model = build_model(ours.gemma_132m().model, VOCAB, seed=0, device="meta")
    flops = ROWS * SEQ_LEN * flops_per_token(model, SEQ_LEN)
    record(f"Training step, Gemma 3 132M, {ROWS} x {SEQ_LEN}", text(timed, flops, peak))


def graft(precision: str) -> Callable[[], float]:
    """graft's step."""
    experiment = ours.gemma_132m("runtime.compile=true", f"precision={precision}", rows=ROWS, seq_len=SEQ_LEN)
    return ours.stepper(ours.trainer(experiment, ours.random_ids(4, ROWS, SEQ_LEN, VOCAB)))


def transformers(name: str) -> Callable[[], float]:
    """One of the peer's loops."""
    theirs = peers.hugging_face_gemma3(build_model(ours.gemma_132m().model, VOCAB, seed=0))
    return peers.causal_lm_stepper(theirs, ours.random_ids(4, ROWS, SEQ_LEN, VOCAB), **PEERS[name])


def text(timed: dict[str, Timed], flops: float, peak: float) -> str:
    """Tables against both of our variants, and the share of the measured peak."""
    ours_bf16, both_fp32 = timed["graft bf16"], ("graft fp32", "transformers fp32 (default)")
    share, best = (100 * flops / seconds / peak for seconds in (ours_bf16.median, ours_bf16.fastest))
    return "\n\n".join(
        [
            f"{flops / 1e9:,.0f} GFLOP per step (visible pairs only). Ratios are against graft bf16:",
            comparison(timed, "graft bf16"),
            "Against graft fp32:",
            comparison({name: timed[name] for name in both_fp32}, "graft fp32"),
            f"graft bf16 uses {share:.0f} % of the {peak / 1e9:,.0f} GFLOP/s measured beside it "
            f"(fastest step {best:.0f} %).",
        ]
    )
