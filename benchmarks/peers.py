"""The peers: Hugging Face's Gemma 3 with our weights and its usual training loop; a small GPT-2 in plain PyTorch."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graft.model import Model

NORMS = {
    "input_layernorm": "attention.norm",
    "post_attention_layernorm": "attention.output_norm",
    "pre_feedforward_layernorm": "mlp.norm",
    "post_feedforward_layernorm": "mlp.output_norm",
}


def hugging_face_gemma3(model: Model) -> Any:
    """``Gemma3ForCausalLM`` of the same shape with the same weights, in fp32, with PyTorch's fused attention."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    config = model.config
    layers: list[tuple[Any, ...]] = [tuple(parts) for parts in config.layers()]
    thetas = {attention.sliding_window is None: attention.position.theta for attention, _ in layers}
    first, mlp = layers[0]
    settings: dict[str, Any] = {"attn_implementation": "sdpa"}
    theirs = Gemma3ForCausalLM(
        Gemma3TextConfig(
            vocab_size=model.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=mlp.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=first.num_heads,
            num_key_value_heads=first.num_kv_heads,
            head_dim=first.head_dim,
            rms_norm_eps=config.norm.model_dump()["eps"],
            sliding_window=first.sliding_window,
            layer_types=[
                "full_attention" if attention.sliding_window is None else "sliding_attention" for attention, _ in layers
            ],
            query_pre_attn_scalar=int(first.query_pre_attn_scalar),
            rope_parameters={
                "sliding_attention": {"rope_type": "default", "rope_theta": thetas[False]},
                "full_attention": {"rope_type": "default", "rope_theta": thetas[True]},
            },
            tie_word_embeddings=True,
            max_position_embeddings=32768,
            **settings,
            pad_token_id=None,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    mine = dict(model.named_parameters())
    copied = {name: mine[_our_name(name)] for name, _ in theirs.named_parameters()}
    assert len(copied) == len(mine)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.copy_(copied[name])
    return theirs


def _our_name(name: str) -> str:
    """A transformers parameter name of Gemma 3 as ours."""
    ends = {"model.embed_tokens.weight": "embedding.weight", "model.norm.weight": "final_norm.weight"}
    if name in ends:
        return ends[name]
    _, layers, index, module, *rest = name.split(".")
    assert layers == "layers", name
    owner = {"self_attn": "attention.part", "mlp": "mlp.part", **NORMS}[module]
    return ".".join(["layers", index, owner, *rest])


def causal_lm_stepper(
    theirs: Any,
    ids: Sequence[Tensor],
    *,
    bf16: bool = False,
    compile: bool = False,
    adamw: dict[str, Any] | None = None,
    max_grad_norm: float | None = 1.0,
    warmup_steps: int = 0,
) -> Callable[[], float]:
    """One step of the usual loop: forward with labels, backward, clip, AdamW. Returns the loss.

    Args:
        theirs: a causal language model of transformers.
        ids: per step [B, T + 1] ids: inputs, and the targets one further.
        bf16: bf16 autocast over fp32 weights.
        compile: torch.compile the model.
        adamw: settings of ``torch.optim.AdamW``; none = its defaults.
        max_grad_norm: gradients are clipped to this norm.
        warmup_steps: steps over which the learning rate rises linearly.
    """
    theirs.train()
    model = torch.compile(theirs) if compile else theirs
    optimizer = torch.optim.AdamW(theirs.parameters(), **(adamw or {}))
    peaks = [group["lr"] for group in optimizer.param_groups]
    pairs = [(batch_BL[:, :-1].contiguous(), batch_BL[:, 1:].contiguous()) for batch_BL in ids]
    turn = 0

    def step() -> float:
        nonlocal turn
        inputs_BT, targets_BT = pairs[turn % len(pairs)]
        turn += 1
        context = torch.autocast("cpu", dtype=torch.bfloat16) if bf16 else contextlib.nullcontext()
        with context:
            loss = model(input_ids=inputs_BT, labels=inputs_BT, shift_labels=targets_BT, use_cache=False).loss
        loss.backward()
        if max_grad_norm is not None:
            nn.utils.clip_grad_norm_(theirs.parameters(), max_grad_norm)
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * min(1.0, turn / max(1, warmup_steps))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


class _GptBlock(nn.Module):
    """A layer of GPT-2: LayerNorm, causal attention, LayerNorm, GELU of four times the width; no biases."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.first_norm, self.second_norm = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        q, k, v = self.qkv(self.first_norm(x_BTD)).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        o = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True)
        x_BTD = x_BTD + self.out(o.transpose(1, 2).flatten(-2))
        return x_BTD + self.down(F.gelu(self.up(self.second_norm(x_BTD))))


class SmallGpt(nn.Module):
    """GPT-2 (learned positions, tied head) in the size of nanoGPT's recipe for characters on a CPU, without dropout."""

    def __init__(self, vocab_size: int, block_size: int):
        super().__init__()
        num_layers, num_heads, width = 4, 4, 128
        self.tokens, self.positions = nn.Embedding(vocab_size, width), nn.Embedding(block_size, width)
        self.blocks = nn.Sequential(*(_GptBlock(width, num_heads) for _ in range(num_layers)))
        self.norm = nn.LayerNorm(width, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                depth = (2 * num_layers) ** -0.5 if name.endswith(("out.weight", "down.weight")) else 1.0
                nn.init.normal_(parameter, std=0.02 * depth)

    def forward(self, ids_BT: Tensor) -> Tensor:
        """Logits [B, T, V]."""
        x_BTD = self.tokens(ids_BT) + self.positions(torch.arange(ids_BT.shape[1]))
        return F.linear(self.norm(self.blocks(x_BTD)), self.tokens.weight)


@dataclass(frozen=True)
class GptRecipe:
    """nanoGPT's recipe for characters on a CPU: AdamW on random crops in fp32, linear warm-up and a cosine."""

    batch_size: int = 12
    block_size: int = 64
    max_steps: int = 2000
    warmup_steps: int = 100
    learning_rate: float = 1e-3
    min_learning_rate: float = 1e-4

    def rate(self, step: int) -> float:
        """The learning rate of an update, counted from 0."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / (self.warmup_steps + 1)
        share = (step - self.warmup_steps) / (self.max_steps - self.warmup_steps)
        cosine = 0.5 * (1 + math.cos(math.pi * share))
        return self.min_learning_rate + cosine * (self.learning_rate - self.min_learning_rate)


def train_small_gpt(
    ids: Tensor, vocab_size: int, recipe: GptRecipe, *, after_step: Callable[[int, SmallGpt], None]
) -> None:
    """Trains on random crops of one long stream of ids; ``after_step`` gets the number of updates, and the model."""
    model = SmallGpt(vocab_size, recipe.block_size)
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.99))
    for step in range(recipe.max_steps):
        starts = torch.randint(len(ids) - recipe.block_size, (recipe.batch_size,)).tolist()
        inputs = torch.stack([ids[i : i + recipe.block_size] for i in starts])
        targets = torch.stack([ids[i + 1 : i + 1 + recipe.block_size] for i in starts])
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate(step)
        loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        after_step(step + 1, model)
