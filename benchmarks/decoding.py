"""How many tokens per second does one sequence decode, against Hugging Face's ``generate`` with equal bf16 weights?"""

from __future__ import annotations

import argparse

import torch

from benchmarks import ours, peers
from benchmarks.timing import comparison, interleaved, record
from graft.generation.engine import generate
from graft.generation.sampling import SamplingSettings
from graft.model import Model, build_model

PROMPT, NEW = 128, 96


def run(args: argparse.Namespace) -> None:
    torch.manual_seed(0)
    model = build_model(ours.gemma_132m().model, 50257, seed=0)
    theirs = peers.hugging_face_gemma3(model).to(torch.bfloat16).eval()
    plain = model.to(torch.bfloat16).eval()
    compiled = build_model(ours.gemma_132m().model, 50257, seed=0, dtype=torch.bfloat16).eval()
    compiled.set_runtime(compile_decode=True)
    prompt = torch.randint(50257, (PROMPT,)).tolist()
    timed = interleaved(
        {
            "graft, decoding compiled": lambda: ours_continues(compiled, prompt),
            "graft": lambda: ours_continues(plain, prompt),
            "transformers generate": lambda: theirs_continues(theirs, prompt),
        },
        rounds=args.rounds,
        warmup=2,
    )
    rates = ", ".join(f"{name} {NEW / t.median:.1f} (fastest {NEW / t.fastest:.1f})" for name, t in timed.items())
    record(
        "Decoding, Gemma 3 132M, bf16, one sequence",
        f"{NEW} tokens after a prompt of {PROMPT}, greedy, prompt included in the time.\n\n"
        f"{comparison(timed, 'graft, decoding compiled')}\n\nTokens per second: {rates}.",
    )


def ours_continues(model: Model, prompt: list[int]) -> tuple[int, ...]:
    made = generate(model, [prompt], settings=SamplingSettings(temperature=0.0), max_new_tokens=NEW)
    assert len(made[0].token_ids) == NEW
    return made[0].token_ids


@torch.inference_mode()
def theirs_continues(theirs: object, prompt: list[int]) -> list[int]:
    ids = torch.tensor([prompt])
    made = theirs.generate(  # pyright: ignore[reportAttributeAccessIssue]
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, use_cache=True
    )
    assert made.shape[1] == PROMPT + NEW
    return made[0, PROMPT:].tolist()
