"""From logits to the next token: pure functions of ``[B, V]`` logits.

The order is that of most libraries: repetition penalty, temperature, top-k, top-p, min-p, draw. Each filter keeps the
most likely token, so a choice always exists.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from graft.errors import ConfigError

REMOVED = float("-inf")
"""Logit of a token that a filter took out."""


@dataclass(frozen=True)
class SamplingSettings:
    """How the next token is chosen.

    Args:
        temperature: logits are divided by it; 0 = greedy (the most likely token, nothing is drawn).
        top_k: keep the k most likely tokens (and those level with the k-th); None = all.
        top_p: keep the smallest set of most likely tokens with at least this probability (1904.09751); None = all.
        min_p: keep tokens at least this share as likely as the most likely one (2407.01082); None = all.
        repetition_penalty: above 1 makes tokens of the prompt and of the continuation less likely (CTRL, 1909.05858).
        seed: together with a prompt it decides every draw.

    Raises:
        ConfigError: a value is out of range, or a filter is given that greedy choice would ignore.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        _require("temperature", self.temperature, 0.0 <= self.temperature < float("inf"), "0 (greedy) or more")
        _require("repetition_penalty", self.repetition_penalty, 0.0 < self.repetition_penalty < float("inf"), "above 0")
        _require("seed", self.seed, self.seed >= 0, "0 or more")
        if self.top_k is not None:
            _require("top_k", self.top_k, self.top_k >= 1, "1 or more")
        if self.top_p is not None:
            _require("top_p", self.top_p, 0.0 < self.top_p <= 1.0, "in (0, 1]")
        if self.min_p is not None:
            _require("min_p", self.min_p, 0.0 <= self.min_p <= 1.0, "in [0, 1]")
        filters = [name for name in ("top_k", "top_p", "min_p") if getattr(self, name) is not None]
        if self.greedy and filters:
            raise ConfigError(
                f"{' and '.join(filters)} do nothing at temperature 0: the most likely token always stays",
                where="sampling settings",
                fix="remove them, or raise the temperature",
            )

    @property
    def greedy(self) -> bool:
        """Nothing is drawn."""
        return self.temperature == 0.0


def _require(name: str, value: float, holds: bool, expected: str) -> None:
    if not holds:
        raise ConfigError(f"{name} is {value}", where="sampling settings", expected=expected)


def penalize_repetition(logits_BV: Tensor, seen_BV: Tensor, penalty: float) -> Tensor:
    """CTRL's penalty (1909.05858): a seen token's logit is divided by ``penalty`` if positive, else multiplied by it.

    The paper divides every logit; dividing a negative one would make the token more likely, so negative logits are
    multiplied, as common libraries do.
    """
    penalized_BV = torch.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
    return torch.where(seen_BV, penalized_BV, logits_BV)


def keep_top_k(logits_BV: Tensor, k: int) -> Tensor:
    """Removes tokens less likely than the k-th; those level with it stay."""
    kth_B1 = logits_BV.topk(min(k, logits_BV.shape[-1]), dim=-1).values[:, -1:]
    return logits_BV.masked_fill(logits_BV < kth_B1, REMOVED)


def keep_top_p(logits_BV: Tensor, p: float) -> Tensor:
    """Nucleus sampling (1904.09751): keeps a token if the more likely ones together are less likely than ``p``."""
    sorted_BV, order_BV = logits_BV.sort(dim=-1, descending=True)
    probs_BV = sorted_BV.softmax(dim=-1)
    removed_BV = (probs_BV.cumsum(dim=-1) - probs_BV) >= p
    removed_BV[:, 0] = False
    return logits_BV.masked_fill(torch.zeros_like(removed_BV).scatter(-1, order_BV, removed_BV), REMOVED)


def keep_min_p(logits_BV: Tensor, p: float) -> Tensor:
    """Min-p (2407.01082): removes tokens less likely than ``p`` times the most likely one."""
    best_B1 = logits_BV.amax(dim=-1, keepdim=True)
    # p(token) < p · p(best) is logit < logit(best) + ln p: no softmax needed
    threshold_B1 = best_B1 + torch.log(torch.tensor(p, dtype=torch.float64)).to(best_B1)
    return logits_BV.masked_fill(logits_BV < threshold_B1, REMOVED)


def draw(logits_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """One token per row by inverting the distribution function of softmax(logits).

    One uniform number per row decides the token, so a row's draw does not depend on the rows beside it.

    Args:
        logits_BV: logits; -inf = never drawn.
        uniform_B: float64 numbers in [0, 1).

    Returns:
        ``[B]`` int64 token ids.
    """
    # float64: over a large vocabulary the rounding of a float32 running sum exceeds the rarest tokens' probabilities
    cdf_BV = logits_BV.double().softmax(dim=-1).cumsum(dim=-1)
    target_B1 = (uniform_B.to(cdf_BV) * cdf_BV[:, -1])[:, None]
    # right=True: the first token whose running sum is *above* the target, which is never one of probability 0
    return torch.searchsorted(cdf_BV, target_B1, right=True).squeeze(-1).clamp_(max=cdf_BV.shape[-1] - 1)


def choose(logits_BV: Tensor, settings: SamplingSettings, uniform_B: Tensor, seen_BV: Tensor) -> Tensor:
    """The next token of every row.

    Args:
        logits_BV: the model's logits.
        settings: what to filter and how to choose.
        uniform_B: float64 numbers in [0, 1), one per row (unused when greedy).
        seen_BV: bool, the tokens the repetition penalty acts on.

    Returns:
        ``[B]`` int64 token ids.
    """
    if settings.repetition_penalty != 1.0:
        logits_BV = penalize_repetition(logits_BV, seen_BV, settings.repetition_penalty)
    if settings.greedy:
        return logits_BV.argmax(dim=-1)
    logits_BV = logits_BV / settings.temperature
    if settings.top_k is not None:
        logits_BV = keep_top_k(logits_BV, settings.top_k)
    if settings.top_p is not None:
        logits_BV = keep_top_p(logits_BV, settings.top_p)
    if settings.min_p is not None:
        logits_BV = keep_min_p(logits_BV, settings.min_p)
    return draw(logits_BV, uniform_B)


def uniforms(seed: int, prompts: Sequence[Sequence[int]], count: int) -> Tensor:
    """The random numbers of every sequence: row i is a pure function of ``seed``, prompt i and how often that prompt
    stands before i. The batch around a prompt and its place there change nothing; equal prompts get different samples.

    Returns:
        ``[B, count]`` float64 in [0, 1), on the CPU.
    """
    repeats: Counter[tuple[int, ...]] = Counter()
    rows: list[Tensor] = []
    for prompt in map(tuple, prompts):
        text = f"{seed}/{repeats[prompt]}/{','.join(map(str, prompt))}"
        repeats[prompt] += 1
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
        rows.append(torch.rand(count, dtype=torch.float64, generator=generator))
    return torch.stack(rows)
