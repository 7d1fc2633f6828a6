"""How fast is a training step of Gemma 3 at 132 million parameters, against Hugging Face's model with the same weights?

Same ids, same clipping. The peer's loops: fp32 with AdamW's defaults; bf16 autocast; bf16 autocast with torch.compile
and fused AdamW. Each side runs in a process of its own, in turn, because memory allocation is one of the differences.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

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
HALF = ("graft bf16", "transformers bf16, compiled, fused AdamW", "transformers bf16")
FULL = ("graft bf16", "graft fp32", "transformers fp32 (default)")


def run(args: argparse.Namespace) -> None:
    half, peak = measure(HALF, args.rounds)
    full, _ = measure(FULL, args.rounds)
    model = build_model(ours.gemma_132m().model, VOCAB, seed=0, device="meta")
    flops = ROWS * SEQ_LEN * flops_per_token(model, SEQ_LEN)
    ours_bf16 = half["graft bf16"]
    share, best = (100 * flops / seconds / peak for seconds in (ours_bf16.median, ours_bf16.fastest))
    record(
        f"Training step, Gemma 3 132M, {ROWS} x {SEQ_LEN}",
        f"{flops / 1e9:,.0f} GFLOP per step (visible pairs only). Against graft bf16:\n\n"
        f"{comparison(half, 'graft bf16')}\n\n{comparison(full, 'graft bf16')}\n\nAgainst graft fp32:\n\n"
        f"{comparison({name: full[name] for name in FULL[1:]}, 'graft fp32')}\n\n"
        f"graft bf16 uses {share:.0f} % of the {peak / 1e9:,.0f} GFLOP/s measured beside it "
        f"(fastest step {best:.0f} %).",
    )


def measure(names: Sequence[str], rounds: int) -> tuple[dict[str, Timed], float]:
    """The named variants in turn, and the rate of bf16 products beside them. Few at once: each takes gigabytes."""
    here = "benchmarks.gemma_training"
    variants = {
        name: Elsewhere(here, "transformers", name=name)
        if name in PEERS
        else Elsewhere(here, "graft", precision=name.removeprefix("graft "))
        for name in names
    }
    rate = Elsewhere("benchmarks.ours", "peak_rate")
    timed = interleaved({**variants, "rate": rate}, rounds=rounds, warmup=2)
    peak = float(rate())
    for variant in (*variants.values(), rate):
        variant.close()
    return {name: timed[name] for name in names}, peak


def graft(precision: str) -> Callable[[], float]:
    """graft's step."""
    experiment = ours.gemma_132m("runtime.compile=true", f"precision={precision}", rows=ROWS, seq_len=SEQ_LEN)
    return ours.stepper(ours.trainer(experiment, ours.random_ids(4, ROWS, SEQ_LEN, VOCAB)))


def transformers(name: str) -> Callable[[], float]:
    """One of the peer's loops."""
    theirs = peers.hugging_face_gemma3(build_model(ours.gemma_132m().model, VOCAB, seed=0))
    return peers.causal_lm_stepper(theirs, ours.random_ids(4, ROWS, SEQ_LEN, VOCAB), **PEERS[name])
