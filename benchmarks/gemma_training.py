"""How fast is a training step of Gemma 3 at 132 million parameters, against Hugging Face's model with the same weights?

Same ids, same clipping, a few steps in a row per turn, as training makes them. The peer's loops: fp32 with AdamW's
defaults; bf16 autocast; bf16 autocast with torch.compile and fused AdamW. Each side runs in a process of its own, in
turn, because memory allocation is one of the differences.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence

from benchmarks import ours, peers
from benchmarks.timing import Elsewhere, Timed, comparison, interleaved, record
from graft.model import build_model
from graft.training.throughput import flops_per_token

ROWS, SEQ_LEN, VOCAB = 8, 128, 50257
STEPS = 3
"""Steps of one turn."""
PEERS = {
    "transformers bf16, compiled, fused AdamW": {"bf16": True, "compile": True, "adamw": {"fused": True}},
    "transformers bf16": {"bf16": True},
    "transformers fp32 (default)": {},
}
HALF = ("graft bf16", "transformers bf16, compiled, fused AdamW", "transformers bf16")
RATE = "rate"
FULL = ("graft bf16", "graft fp32", "transformers fp32 (default)")


def run(args: argparse.Namespace) -> None:
    half = measure(HALF, args.rounds)
    full = measure(FULL, args.rounds)
    model = build_model(ours.gemma_132m().model, VOCAB, seed=0, device="meta")
    flops = ROWS * SEQ_LEN * flops_per_token(model, SEQ_LEN)
    shares = [ours.share_of_rate(timed["graft bf16"], flops, timed[RATE]) for timed in (half, full)]
    record(
        f"Training step, Gemma 3 132M, {ROWS} x {SEQ_LEN}",
        f"{flops / 1e9:,.0f} GFLOP per step (visible pairs only). Against graft bf16:\n\n"
        f"{comparison(only(half, HALF), 'graft bf16')}\n\n{comparison(only(full, FULL), 'graft bf16')}\n\n"
        f"Against graft fp32:\n\n{comparison(only(full, FULL[1:]), 'graft fp32')}\n\n"
        f"graft bf16 uses {shares[0]:.0f} and {shares[1]:.0f} % of the rate of matrix products in the same rounds.",
    )


def only(timed: Mapping[str, Timed], names: Sequence[str]) -> dict[str, Timed]:
    """The named ones."""
    return {name: timed[name] for name in names}


def measure(names: Sequence[str], rounds: int) -> dict[str, Timed]:
    """The named variants in turn, and the rate of bf16 products beside them. Few at once: each takes gigabytes."""
    here = "benchmarks.gemma_training"
    variants = {
        name: Elsewhere(here, "transformers", name=name)
        if name in PEERS
        else Elsewhere(here, "graft", precision=name.removeprefix("graft "))
        for name in names
    }
    variants[RATE] = Elsewhere("benchmarks.ours", "peak_rate")
    timed = interleaved(variants, rounds=rounds)
    for variant in variants.values():
        variant.close()
    return {name: each if name == RATE else each.per(STEPS) for name, each in timed.items()}


def graft(precision: str) -> Callable[[], None]:
    """graft's steps of one turn."""
    experiment = ours.gemma_132m("runtime.compile=true", f"precision={precision}", rows=ROWS, seq_len=SEQ_LEN)
    return several(ours.stepper(ours.trainer(experiment, ours.random_ids(4, ROWS, SEQ_LEN, VOCAB))))


def transformers(name: str) -> Callable[[], None]:
    """The steps of one turn of one of the peer's loops."""
    theirs = peers.hugging_face_gemma3(build_model(ours.gemma_132m().model, VOCAB, seed=0))
    return several(peers.causal_lm_stepper(theirs, ours.random_ids(4, ROWS, SEQ_LEN, VOCAB), **PEERS[name]))


def several(step: Callable[[], float]) -> Callable[[], None]:
    """`STEPS` of them, one after another."""

    def turn() -> None:
        for _ in range(STEPS):
            step()

    return turn
