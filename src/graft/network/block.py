"""Residual branches, and a layer as a list of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from graft.config.families import PartConfig
from graft.config.model import ModelConfig
from graft.config.roles import Role
from graft.initialization import Rng
from graft.network.complete import check_output, check_part
from graft.part import Context, PartOutput, Site, State, add_sums
from graft.shapes import Float


class LayerScale(nn.Module):
    """A learned factor per channel, all equal at start (CaiT, 2103.17239). No deviation."""

    role: Role = "scalar"

    def __init__(self, initial: float, size: int):
        super().__init__()
        self.initial = initial
        self.weight = nn.Parameter(torch.empty(size))

    def init_parameters(self, rng: Rng) -> None:
        nn.init.constant_(self.weight, self.initial)

    def forward(self, x: Float[Tensor, "*batch size"]) -> Float[Tensor, "*batch size"]:
        return x * self.weight.to(x.dtype)


class Branch(nn.Module):
    """A part joined to the residual stream. With n, n2 norms and f = scale · layer_scale ⊙ dropout(part):

    - pre: ``x + f(n(x))`` (GPT-2, Llama)
    - post: ``n(x + f(x))`` (1706.03762)
    - sandwich: ``x + scale · layer_scale ⊙ dropout(n2(part(n(x))))`` (Gemma 2)
    - output: ``x + scale · layer_scale ⊙ dropout(n2(part(x)))`` (OLMo 2)
    - none: ``x + f(x)``

    A part with ``norms_inside`` reads x itself in all of them.

    Args:
        config: the part's config; its branch fields win over the model's.
        model: the model's config.
        site: where the part stands.
    """

    def __init__(self, config: PartConfig, model: ModelConfig, site: Site):
        super().__init__()
        placement = config.norm_placement or model.norm_placement
        norm, width = config.norm or model.norm, site.hidden_size
        self.scale = model.residual_scale if config.residual_scale is None else config.residual_scale
        norms_first = placement in ("pre", "sandwich") and not config.norms_inside
        self.norm = norm.build(width) if norms_first else None
        self.part = config.build(site)
        check_part(self.part, config)
        self.output_norm = norm.build(width) if placement in ("sandwich", "output") else None
        self.dropout = nn.Dropout(config.residual_dropout)
        self.layer_scale = None if config.layer_scale is None else LayerScale(config.layer_scale, width)
        self.post_norm = norm.build(width) if placement == "post" else None

    def forward(self, x_BTD: Float[Tensor, "B T D"], ctx: Context, state: State = None) -> PartOutput:
        """The new residual stream as ``y`` of the part's output."""
        out: PartOutput = self.part(x_BTD if self.norm is None else self.norm(x_BTD), ctx, state)
        check_output(out, self.part)
        y_BTD = out.y if self.output_norm is None else self.output_norm(out.y)
        y_BTD = self.dropout(y_BTD)
        if self.layer_scale is not None:
            y_BTD = self.layer_scale(y_BTD)
        if self.scale != 1.0:
            y_BTD = y_BTD * self.scale
        x_BTD = x_BTD + y_BTD
        return out._replace(y=x_BTD if self.post_norm is None else self.post_norm(x_BTD))


class BlockOutput(NamedTuple):
    """What a layer returns.

    Args:
        x: [B, T, D], the residual stream.
        states: what each branch hands to its next call, by branch name.
        aux: the parts' named sums, added up over the layer.
        published: what later layers may read, everything from before included.
        usage: the parts' counts, named ``<branch>.<what is counted>``.
    """

    x: Tensor
    states: dict[str, State]
    aux: dict[str, Tensor]
    published: Mapping[str, Tensor]
    usage: dict[str, Tensor]


class Block(nn.ModuleDict):
    """One layer: its branches by name, run in order.

    Args:
        parts: configs of the parts by branch name, in order.
        model: the model's config.
        site: where the layer stands.
    """

    def __init__(self, parts: Mapping[str, PartConfig], model: ModelConfig, site: Site):
        super().__init__({name: Branch(part, model, site) for name, part in parts.items()})

    def branches(self) -> Iterator[tuple[str, Branch]]:
        """Names and branches, in order."""
        for name, branch in self.items():
            assert isinstance(branch, Branch)
            yield name, branch

    def forward(self, x_BTD: Tensor, ctx: Context, states: Mapping[str, State] | None = None) -> BlockOutput:
        """Runs the branches. ``states`` is None outside decoding, else what each branch returned last time."""
        new_states: dict[str, State] = {}
        aux: dict[str, Tensor] = {}
        usage: dict[str, Tensor] = {}
        for name, branch in self.branches():
            out: PartOutput = branch(x_BTD, ctx, None if states is None else states[name])
            x_BTD = out.y
            new_states[name] = out.state
            aux = add_sums(aux, out.aux)
            usage |= {f"{name}.{counted}": counts for counted, counts in out.usage.items()}
            if out.published:
                ctx = dataclasses.replace(ctx, published={**ctx.published, **out.published})
        return BlockOutput(x_BTD, new_states, aux, ctx.published, usage)
