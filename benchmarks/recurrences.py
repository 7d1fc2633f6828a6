"""Retention: chunks against all pairs and against the recurrence. Mamba-2: the layer stack against transformers'.

Forward and backward, fp32. graft runs on the route of fp32 products that ``graft train`` finds out where that is
faster; all others run as PyTorch starts, and so does graft once more.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import comparison, interleaved, record
from graft.config.model import ModelConfig
from graft.model import Model, build_model
from graft.ops.decay_attention import chunked_decay_attention
from graft.ops.decay_attention_reference import parallel_decay_attention, recurrent_decay_attention
from graft.token_mixers.retention import log_factors
from graft.training.matmul import use_onednn_fp32

B, T, N, H = 2, 1024, 8, 64
VALUE_FACTORS = (1, 2)
OWN = "graft"
"""Variants whose names begin so run on graft's own route of fp32 products."""


def run(args: argparse.Namespace) -> None:
    before = torch.get_float32_matmul_precision()
    try:
        for factor in VALUE_FACTORS:
            retention(factor, args.rounds)
        mamba2(args.rounds)
    finally:
        torch.set_float32_matmul_precision(before)


def routed(name: str, call: Callable[[], object]) -> Callable[[], None]:
    """``call`` with its variant's route of fp32 products."""

    def routed_call() -> None:
        use_onednn_fp32(name.startswith(OWN))
        call()

    return routed_call


def retention(value_factor: int, rounds: int) -> None:
    """The three forms over the same numbers."""
    q, k = (torch.randn(B, T, N, H).requires_grad_() for _ in range(2))
    v = torch.randn(B, T, N, value_factor * H).requires_grad_()
    log_decay_11N = log_factors(N, device=q.device, dtype=q.dtype)[None, None]
    direction = torch.randn_like(v)
    forms: dict[str, Callable[..., Any]] = {
        "graft, chunks": chunked_decay_attention,
        "chunks, PyTorch's route of products": chunked_decay_attention,
        "all pairs": parallel_decay_attention,
        "recurrence": recurrent_decay_attention,
    }

    def both_ways(form: Callable[..., Any]) -> Tensor:
        y = form(q, k * H**-0.5, v, log_decay_11N)
        y = y[0] if isinstance(y, tuple) else y
        y.backward(direction)
        return y

    expected = both_ways(recurrent_decay_attention)
    for form in forms.values():
        torch.testing.assert_close(both_ways(form), expected, rtol=1e-3, atol=1e-3)
    timed = interleaved({name: routed(name, partial(both_ways, form)) for name, form in forms.items()}, rounds=rounds)
    record(
        f"Retention in three forms, values {value_factor} x {H}",
        f"{B} sequences of {T}, {N} heads of {H} channels.\n\n{comparison(timed, 'graft, chunks')}",
    )


def mamba2(rounds: int) -> None:
    """Two layers of width 512, embedding and last norm with them, equal weights."""
    ours, theirs = stacks()
    ids_BT = torch.randint(256, (B, T), generator=torch.Generator().manual_seed(0))

    def mine() -> Tensor:
        return ours.features(ids_BT).x_BTD

    def transformers() -> Tensor:
        return theirs.backbone(ids_BT).last_hidden_state

    with torch.no_grad():
        torch.testing.assert_close(mine(), transformers(), rtol=1e-3, atol=1e-3)
    forms = {"graft": mine, "transformers": transformers, "own code, PyTorch's route of products": mine}
    calls = {name: routed(name, lambda form=form: form().square().sum().backward()) for name, form in forms.items()}
    timed = interleaved(calls, rounds=rounds)
    record("Mamba-2, two layers of width 512", f"{B} sequences of {T}.\n\n{comparison(timed, 'graft')}")


def stacks() -> tuple[Model, Any]:
    """Ours and transformers', with the same weights."""
    from transformers import Mamba2Config, Mamba2ForCausalLM

    theirs = Mamba2ForCausalLM(
        Mamba2Config(
            vocab_size=256,
            hidden_size=512,
            num_hidden_layers=2,
            state_size=128,
            num_heads=16,
            head_dim=64,
            n_groups=1,
            tie_word_embeddings=False,
        )
    )
    config = ModelConfig.model_validate(
        {
            "hidden_size": 512,
            "num_layers": 2,
            "norm": {"type": "rms_norm", "eps": 1e-5},
            "blocks": {"layer": [{"type": "mamba2"}]},
            "head": {"tie_word_embeddings": False},
        }
    )
    ours = build_model(config, 256, seed=0)
    ours.load_state_dict({our_name(name): _like_ours(name, w) for name, w in theirs.state_dict().items()})
    return ours, theirs


def _like_ours(name: str, weight: Tensor) -> Tensor:
    return weight[:, 0].clone() if name.endswith("conv1d.weight") else weight.clone()


def our_name(name: str) -> str:
    """A parameter of transformers' model as ours is called."""
    ends = {"backbone.embeddings.weight": "embedding.weight", "lm_head.weight": "head.weight"}
    if name in ends:
        return ends[name]
    if name.startswith("backbone.norm_f."):
        return name.replace("backbone.norm_f.", "final_norm.")
    layer, rest = name.removeprefix("backbone.layers.").split(".", 1)
    inside = rest.replace("mixer.conv1d.", "part.conv.").replace("mixer.", "part.")
    return f"layers.{layer}.mamba2.{inside}"
