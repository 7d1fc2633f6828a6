"""Does bf16 training of Gemma 3 at 132 million parameters give Hugging Face's losses? Equal weights, data and AdamW."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from statistics import mean

import torch
from torch import Tensor

from benchmarks import ours, peers
from benchmarks.timing import Elsewhere, record, table
from benchmarks.tokenizing import library_sources
from graft.data.tokenizers.bpe import BpeTokenizer
from graft.data.tokenizers.bpe_config import BpeTokenizerConfig
from graft.model import build_model

STEPS, ROWS, SEQ_LEN, VOCAB = 200, 8, 128, 50257
RATE, WARMUP = 1e-4, 20
"""The preset's rate is meant for batches of 131,072 tokens. With 1024 it makes training so unstable that differences in
the last bit of bf16 grow into whole per cents (at 5e-4: up to 0.53 % in means of 20 steps, in either direction)."""

SMOOTHED = 20


def run(_: argparse.Namespace) -> None:
    sides = [Elsewhere("benchmarks.loss_curve", name) for name in ("graft", "transformers")]
    curves: list[list[float]] = [[], []]
    with ThreadPoolExecutor(2) as pool:  # nothing is timed: both may run at once
        for step in range(1, STEPS + 1):
            for curve, loss in zip(curves, pool.map(lambda side: side(), sides), strict=True):
                curve.append(loss)
            if step % 20 == 0:
                print(step, [curve[-1] for curve in curves], flush=True)
    for side in sides:
        side.close()
    apart = [abs(a - b) / b for a, b in zip(*curves, strict=True)]
    means = [[mean(curve[i : i + SMOOTHED]) for i in range(0, STEPS, SMOOTHED)] for curve in curves]
    means_apart = [abs(a - b) / b for a, b in zip(*means, strict=True)]
    shown = [0, 9, 49, 99, 149, 199]
    rows = [[str(i + 1), *(f"{curve[i]:.4f}" for curve in curves), f"{100 * apart[i]:.3f} %"] for i in shown]
    record(
        "Equal losses, Gemma 3 132M, bf16",
        f"{STEPS} steps of {ROWS} x {SEQ_LEN} tokens of Python source from equal weights, AdamW at {RATE} after "
        f"{WARMUP} steps of warm-up; the peer is transformers, bf16 autocast, compiled. Furthest apart: "
        f"{100 * max(apart):.3f} % at a single step, {100 * max(means_apart):.3f} % in means of {SMOOTHED} steps "
        "(goal: 0.5 %).\n\n" + table(["step", "graft", "transformers", "apart"], rows),
    )


def batches() -> list[Tensor]:
    """Ids of consecutive stretches of source text, shuffled."""
    texts = library_sources(2_000_000)
    tokenizer = BpeTokenizer(BpeTokenizerConfig(vocab_size=8192))
    tokenizer.train(texts)
    stream = torch.cat([torch.from_numpy(ids.astype("int64")) for ids in tokenizer.encode_batch(texts)])
    rows = stream[: len(stream) // (SEQ_LEN + 1) * (SEQ_LEN + 1)].view(-1, SEQ_LEN + 1)
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]
    assert len(rows) >= STEPS * ROWS, "each row is seen once"
    return list(rows[: STEPS * ROWS].split(ROWS))


def graft() -> Callable[[], float]:
    """graft's step."""
    same = [
        f"optimizer={{type: adamw, learning_rate: {RATE}, betas: [0.9, 0.999], weight_decay: 0.0}}",
        f"schedule={{type: constant, warmup_steps: {WARMUP}}}",
    ]
    experiment = ours.gemma_132m("runtime.compile=true", "precision=bf16", *same, rows=ROWS, seq_len=SEQ_LEN)
    return ours.stepper(ours.trainer(experiment, batches()))


def transformers() -> Callable[[], float]:
    """The peer's step."""
    theirs = peers.hugging_face_gemma3(build_model(ours.gemma_132m().model, VOCAB, seed=0))
    adamw = {"lr": RATE, "betas": (0.9, 0.999), "weight_decay": 0.0, "fused": True}
    return peers.causal_lm_stepper(theirs, batches(), bf16=True, compile=True, adamw=adamw, warmup_steps=WARMUP)
