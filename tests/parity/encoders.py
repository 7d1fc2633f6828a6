"""Weights of a transformers encoder for masked words copied into ours by name, and both compared on padded rows."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from weights import TOLERANCE, assert_close, randomize

from graft.config.model import ModelConfig
from graft.model import Model, build_model

V, D, F, T = 43, 24, 40, 13

Names = Mapping[str, str | Sequence[str]]
"""Pattern of a transformers name -> ours, ``\\1`` for what a group holds. Several of ours are stacked in theirs."""


@dataclass(frozen=True)
class Encoders:
    """Both models with the same weights.

    Args:
        theirs: the oracle.
        ours: the model under test.
        names: how their parameters are called here.
    """

    theirs: torch.nn.Module
    ours: Model
    names: Names

    def translated(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Their named tensors under our names. Of a token type table only row 0 is used, by all their tokens."""
        found: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            (pattern,) = (p for p in self.names if re.fullmatch(p, name))
            target = self.names[pattern]
            own = [target] if isinstance(target, str) else list(target)
            pieces = [tensor[0]] if own == ["embedding.token_type"] else tensor.chunk(len(own))
            for to, piece in zip(own, pieces, strict=True):
                found[re.sub(pattern, to, name)] = piece
        return found


def paired(theirs: torch.nn.Module, config: ModelConfig, names: Names) -> Encoders:
    """Both in fp64 with the same random weights; asserts that no parameter on either side is left out."""
    theirs = theirs.double().eval()
    randomize(theirs)
    ours = build_model(config, V, seed=0, dtype=torch.float64).eval()
    both = Encoders(theirs, ours, names)
    copied, mine = both.translated(dict(theirs.named_parameters())), dict(ours.named_parameters())
    assert copied.keys() == mine.keys()
    with torch.no_grad():
        for name, parameter in mine.items():
            parameter.copy_(copied[name])
    return both


NOISE = 1e-12
"""Of the largest gradient: what is smaller is rounding of nothing."""


def padded_batch(lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Ids, and 1 for real tokens, 0 for the padding behind them. Id 0 is in no row: their padding has no gradient."""
    ids = torch.randint(1, V, (len(lengths), T))
    real = torch.stack([(torch.arange(T) < length).long() for length in lengths])
    return ids, real


def assert_same_on_padded_rows(both: Encoders, lengths: Sequence[int] = (T, T - 5, 3)) -> None:
    """Logits of the real tokens, and every parameter's gradient by them.

    A bias on keys adds the same to all scores of a query where no position turns it, so that its gradient is zero.
    """
    ids, real = padded_batch(lengths)
    expected = both.theirs(ids, attention_mask=real).logits[real.bool()]
    actual = both.ours(ids, segment_ids_BT=real)[real.bool()]
    assert_close(actual, expected, "logits")
    direction = torch.randn_like(expected)
    (expected * direction).sum().backward()
    (actual * direction).sum().backward()
    wanted = both.translated({n: p.grad for n, p in both.theirs.named_parameters() if p.grad is not None})
    mine = {name: p.grad for name, p in both.ours.named_parameters() if p.grad is not None}
    assert wanted.keys() == mine.keys() == dict(both.ours.named_parameters()).keys()
    noise = NOISE * max(grad.abs().max().item() for grad in wanted.values())
    for name, grad in wanted.items():
        if grad.abs().max() > noise:
            assert_close(mine[name], grad, f"gradient of {name}", 10 * TOLERANCE)
        else:
            assert name.endswith("k_proj.bias"), f"{name} has no gradient to compare"
            assert mine[name].abs().max() <= noise, name


@torch.no_grad()
def assert_same_without_padding(both: Encoders) -> None:
    """Logits of whole rows, no mask on either side."""
    ids, _ = padded_batch((T, T))
    assert_close(both.ours(ids), both.theirs(ids).logits, "logits without a mask")
