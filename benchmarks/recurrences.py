"""Retention: chunks against all pairs and against the recurrence. Mamba-2: the layer stack against transformers'.

Forward and backward, fp32, each side in a process of its own. graft is set up as ``graft train`` sets itself up where
that is faster (allocator, route of fp32 products); all others run as PyTorch starts, and so does graft once more.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import Elsewhere, comparison, interleaved, record
from graft.config.model import ModelConfig
from graft.model import Model, build_model
from graft.ops.decay_attention import chunked_decay_attention
from graft.ops.decay_attention_reference import parallel_decay_attention, recurrent_decay_attention
from graft.token_mixers.retention import log_factors
from graft.training.matmul import use_onednn_fp32
from graft.training.runtime import tune_allocator

B, T, N, H = 2, 1024, 8, 64
VALUE_FACTORS = (1, 2)


def run(args: argparse.Namespace) -> None:
    for factor in VALUE_FACTORS:
        text = f"{B} sequences of {T}, {N} heads of {H} channels."
        compare(f"Retention in three forms, values {factor} x {H}", text, retention, RETENTION, args, factor=factor)
    compare("Mamba-2, two layers of width 512", f"{B} sequences of {T}.", mamba2, MAMBA2, args)


def compare(
    title: str, text: str, function: Callable[..., object], sides: dict[str, str], args: Any, **more: int
) -> None:
    """Records a table of the sides, the first against the others; each runs in a process of its own."""
    processes = {
        name: Elsewhere("benchmarks.recurrences", function.__name__, form=form, tuned=name.startswith("graft"), **more)
        for name, form in sides.items()
    }
    timed = interleaved(processes, rounds=args.rounds)
    for process in processes.values():
        process.close()
    record(title, f"{text}\n\n{comparison(timed, next(iter(sides)))}")


def tune() -> None:
    """What ``graft train`` does at its start where it is faster: glibc keeps memory, oneDNN multiplies."""
    tune_allocator()
    use_onednn_fp32(True)


RETENTION = {
    "graft, chunks": "chunks",
    "chunks, PyTorch's settings": "chunks",
    "all pairs": "pairs",
    "recurrence": "recurrence",
}
"""Side -> form. What begins with graft is tuned."""

MAMBA2 = {"graft": "graft", "own code, PyTorch's settings": "graft", "transformers": "transformers"}

FORMS: dict[str, Callable[..., Any]] = {
    "chunks": chunked_decay_attention,
    "pairs": parallel_decay_attention,
    "recurrence": recurrent_decay_attention,
}


def retention(*, form: str, tuned: bool, factor: int) -> Callable[[], None]:
    """One form forward and backward, after a look at whether its numbers are those of the recurrence."""
    if tuned:
        tune()
    torch.manual_seed(0)
    q, k = (torch.randn(B, T, N, H).requires_grad_() for _ in range(2))
    v = torch.randn(B, T, N, factor * H).requires_grad_()
    log_decay_11N = log_factors(N, device=q.device, dtype=q.dtype)[None, None]
    direction = torch.randn_like(v)

    def outputs(name: str) -> Tensor:
        y = FORMS[name](q, k * H**-0.5, v, log_decay_11N)
        return y[0] if isinstance(y, tuple) else y

    def call() -> None:
        outputs(form).backward(direction)

    with torch.no_grad():
        torch.testing.assert_close(outputs(form), outputs("recurrence"), rtol=1e-3, atol=1e-3)
    return call


def mamba2(*, form: str, tuned: bool) -> Callable[[], None]:
    """Two layers of width 512, embedding and last norm with them, of ours or transformers', with equal weights."""
    if tuned:
        tune()
    ours, theirs = stacks()
    ids_BT = torch.randint(256, (B, T), generator=torch.Generator().manual_seed(0))

    def outputs(name: str) -> Tensor:
        return ours.features(ids_BT).x_BTD if name == "graft" else theirs.backbone(ids_BT).last_hidden_state

    with torch.no_grad():
        torch.testing.assert_close(outputs("graft"), outputs("transformers"), rtol=1e-3, atol=1e-3)
    return lambda: outputs(form).square().sum().backward()


def stacks() -> tuple[Model, Any]:
    """Ours and transformers', with the same weights."""
    from transformers import Mamba2Config, Mamba2ForCausalLM, logging

    logging.set_verbosity_error()  # it says that the path measured here is the slow one
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
