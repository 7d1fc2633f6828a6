"""Weights of a transformers decoder copied into ours by name, and both compared: logits, gradients, decoding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from graft.config.fields import tag_of
from graft.config.model import ModelConfig
from graft.model import Model, build_model

NORMS = {
    "pre": {"input_layernorm": "{mixer}.norm", "post_attention_layernorm": "mlp.norm"},
    "sandwich": {
        "input_layernorm": "{mixer}.norm",
        "post_attention_layernorm": "{mixer}.output_norm",
        "pre_feedforward_layernorm": "mlp.norm",
        "post_feedforward_layernorm": "mlp.output_norm",
    },
}
"""Norm placement -> a layer's norm there -> its name here."""

ENDS = {
    "model.embed_tokens.weight": "embedding.weight",
    "model.norm.weight": "final_norm.weight",
    "lm_head.weight": "head.weight",
}

TOLERANCE = 2e-6
"""Of the largest value, in fp64: transformers rounds norms, rotary tables and softmax to fp32 even there."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a test model: ``kv`` of ``heads`` heads of ``head_dim``, sequences of ``seq_len``."""

    heads: int
    kv: int
    head_dim: int
    seq_len: int
    window: int | None = None
    hidden: int = 24
    layers: int = 2
    vocab: int = 43
    tied: bool = True

    def __str__(self) -> str:
        tie = "tied" if self.tied else "untied"
        return f"N{self.heads}K{self.kv}H{self.head_dim}T{self.seq_len}W{self.window}{tie}"

    def theirs(self, **more: Any) -> dict[str, Any]:
        """Arguments every transformers config shares."""
        return {
            "vocab_size": self.vocab,
            "hidden_size": self.hidden,
            "intermediate_size": 40,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv,
            "head_dim": self.head_dim,
            "rms_norm_eps": 1e-2,  # large, so that a misplaced one shows
            "tie_word_embeddings": self.tied,
            "max_position_embeddings": 2048,
            "attn_implementation": "eager",
            "pad_token_id": None,
            **more,
        }

    def attention(self, **more: Any) -> dict[str, Any]:
        """Our attention of these sizes."""
        return {
            "type": "attention",
            "num_heads": self.heads,
            "num_kv_heads": self.kv,
            "head_dim": self.head_dim,
            **more,
        }

    def ours(self, blocks: dict[str, Any], *, layout: list[str] | None = None, **more: Any) -> ModelConfig:
        """Our config around these blocks."""
        head = {"tie_word_embeddings": self.tied, **more.pop("head", {})}
        return ModelConfig.model_validate(
            {
                "hidden_size": self.hidden,
                "num_layers": self.layers,
                "norm": {"type": "rms_norm", "eps": 1e-2},
                "blocks": blocks,
                "layout": layout,
                "head": head,
                **more,
            }
        )

    def ids(self, batch_size: int = 2) -> Tensor:
        return torch.randint(self.vocab, (batch_size, self.seq_len))


def our_name(name: str, config: ModelConfig) -> str:
    """A transformers parameter name as ours, e.g. ``layers.0.attention.part.q_proj.weight``. KeyError if unknown.

    The first part of a block is the token mixer, in all layers of one type.
    """
    if name in ENDS:
        return ENDS[name]
    _, layers, index, module, *rest = name.split(".")
    assert layers == "layers", name
    owner = {"self_attn": "{mixer}.part", "mlp": "mlp.part", **NORMS[config.norm_placement]}[module]
    mixer = tag_of(type(config.layers()[0][0]))
    return ".".join(["layers", index, owner.format(mixer=mixer), *rest])


@torch.no_grad()
def randomize(theirs: torch.nn.Module) -> None:
    """Every parameter, norms too, away from its start, so that none hides."""
    for name, parameter in theirs.named_parameters():
        centre = 0.0 if parameter.dim() > 1 else parameter.mean()
        spread = 0.5 if "embed" in name else 0.25
        parameter.copy_(centre + spread * torch.randn_like(parameter))


def pair(theirs: torch.nn.Module, config: ModelConfig) -> tuple[torch.nn.Module, Model]:
    """Both models in fp64 with the same random weights; asserts that no parameter on either side is left out."""
    theirs = theirs.double().eval()
    randomize(theirs)
    vocab_size = theirs.get_parameter("model.embed_tokens.weight").shape[0]
    ours = build_model(config, vocab_size, seed=0, dtype=torch.float64).eval()
    copied = {our_name(name, config): p for name, p in theirs.named_parameters()}
    mine = dict(ours.named_parameters())
    assert copied.keys() == mine.keys()
    with torch.no_grad():
        for name, parameter in mine.items():
            parameter.copy_(copied[name])
    return theirs, ours


def assert_close(actual: Tensor, expected: Tensor, what: str, tolerance: float = TOLERANCE) -> None:
    """Equal up to ``tolerance`` of the largest expected value."""
    assert actual.shape == expected.shape, what
    error, scale = (actual - expected).abs().max(), expected.abs().max()
    assert error <= tolerance * scale, f"{what}: off by {error:.2e}, largest value {scale:.2e}"


def assert_same_logits_and_gradients(
    theirs: torch.nn.Module, ours: Model, ids: Tensor, *, gradients: float = 10 * TOLERANCE
) -> None:
    """One forward and backward of both; every parameter's gradient is compared, up to ``gradients`` of its largest."""
    expected = theirs(ids).logits
    actual = ours(ids)
    assert_close(actual, expected, "logits")
    direction = torch.randn_like(expected)
    (expected * direction).sum().backward()
    (actual * direction).sum().backward()
    mine = dict(ours.named_parameters())
    for name, parameter in theirs.named_parameters():
        grad = mine[our_name(name, ours.config)].grad
        assert grad is not None
        assert parameter.grad is not None
        assert_close(grad, parameter.grad, f"gradient of {name}", gradients)


@torch.no_grad()
def assert_same_decoding(theirs: torch.nn.Module, ours: Model, ids: Tensor, prefill: int) -> None:
    """A prefill, then token by token, both with their caches."""
    state, cache = ours.init_state(*ids.shape), None
    for chunk in ids.split([prefill] + [1] * (ids.shape[1] - prefill), dim=1):
        output = theirs(chunk, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits, state = ours.decode(chunk, state)
        assert_close(logits, output.logits, f"logits after {state.length} tokens")


@torch.no_grad()
def assert_same_with_left_padding(theirs: torch.nn.Module, ours: Model, ids: Tensor, pads: list[int]) -> None:
    """Real tokens of rows padded on the left, transformers' attention mask against our segment ids.

    In fp32: in fp64 transformers' mask overflows to -inf, which makes rows without a visible key NaN.
    """
    theirs, ours = theirs.float(), ours.float()
    real = torch.ones_like(ids)
    for row, pad in enumerate(pads):
        real[row, :pad] = 0
    positions = (real.cumsum(1) - 1).clamp(min=0)
    expected = theirs(ids, attention_mask=real, position_ids=positions).logits
    actual = ours(ids, segment_ids_BT=real)
    assert_close(actual[real.bool()], expected[real.bool()], "logits of real tokens", 1e-5)
