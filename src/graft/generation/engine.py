"""Continuing token sequences: one prefill, then one cached step per token."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from graft.errors import ConfigError
from graft.generation.sampling import SamplingSettings, choose, uniforms
from graft.model import Model

Finish = Literal["length", "end", "stop"]
"""Why a sequence ended: max_new_tokens reached, an id of ``end_ids`` chosen, or ``on_token`` asked for it."""

OnToken = Callable[[int, int], bool]
"""Called with (row, token id) for every new token as soon as it is chosen; True ends that row."""


@dataclass(frozen=True)
class Generation:
    """One continued sequence.

    Args:
        prompt_ids: what was continued.
        token_ids: the new tokens, without the one of ``end_ids`` that ended it.
        finish: why it ended.
        text: the new tokens as text, when a tokenizer took part (cut before a stop string).
    """

    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    finish: Finish
    text: str | None = None


def left_pad(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor | None]:
    """Prompts as one tensor, padded on the left so that all end in the same column.

    Returns:
        ids ``[B, T]`` and segment ids ``[B, T]`` (0 = padding, 1 = prompt; None when nothing is padded).
    """
    longest = max(map(len, prompts))
    ids_BT = torch.zeros(len(prompts), longest, dtype=torch.long)
    segments_BT = torch.zeros(len(prompts), longest, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids_BT[row, longest - len(prompt) :] = torch.tensor(prompt, dtype=torch.long)
        segments_BT[row, longest - len(prompt) :] = 1
    return ids_BT, None if bool(segments_BT.all()) else segments_BT


def check_prompts(model: Model, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    """Raises ConfigError for what the model cannot continue: nothing, foreign ids, or more than its positions reach."""
    if not prompts or any(len(prompt) == 0 for prompt in prompts):
        raise ConfigError(
            "there is no token to continue", where="prompts", fix="start an empty prompt with the end-of-document id"
        )
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens is {max_new_tokens}", expected="1 or more")
    highest = max(max(prompt) for prompt in prompts)
    lowest = min(min(prompt) for prompt in prompts)
    if lowest < 0 or highest >= model.vocab_size:
        wrong = lowest if lowest < 0 else highest
        raise ConfigError(f"token id {wrong} in a prompt", where="prompts", expected=f"ids below {model.vocab_size}")
    limit = getattr(model.config.embedding.position, "max_seq_len", None)
    length = max(map(len, prompts)) + max_new_tokens
    if limit is not None and length > limit:
        raise ConfigError(
            f"a prompt and max_new_tokens = {max_new_tokens} make {length} tokens, the model has {limit} positions",
            fix="shorten the prompt or lower max_new_tokens",
        )


@contextmanager
def evaluating(model: Model) -> Iterator[None]:
    """Inference mode, dropout off; the model's own mode comes back afterwards."""
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(was_training)


class _Rows:
    """The sequences being written: which run on, what they hold, why they ended."""

    def __init__(self, count: int, end_ids: Collection[int], on_token: OnToken | None):
        self.tokens: list[list[int]] = [[] for _ in range(count)]
        self.finish: list[Finish] = ["length"] * count
        self.running = list(range(count))
        self.end_ids = frozenset(end_ids)
        self.on_token = on_token

    def take(self, tokens: list[int]) -> None:
        """Adds one token to every running row (``tokens`` has one per row, running or not)."""
        self.running = [row for row in self.running if self._goes_on(row, tokens[row])]

    def _goes_on(self, row: int, token: int) -> bool:
        if token in self.end_ids:
            self.finish[row] = "end"
            return False
        self.tokens[row].append(token)
        if self.on_token is not None and self.on_token(row, token):
            self.finish[row] = "stop"
            return False
        return True


def generate(
    model: Model,
    prompts: Sequence[Sequence[int]],
    *,
    settings: SamplingSettings,
    max_new_tokens: int,
    end_ids: Collection[int] = (),
    vocab_size: int | None = None,
    on_token: OnToken | None = None,
) -> list[Generation]:
    """Continues every prompt by up to ``max_new_tokens`` tokens.

    All prompts run as one batch, padded on the left with segment 0; the prompt is read once, then each step feeds one
    token per row through `Model.decode`. A row that has ended is fed on (its tokens are dropped) until all have.

    Args:
        model: any model with a causal decode.
        prompts: token ids, at least one each.
        settings: how tokens are chosen.
        max_new_tokens: most tokens added to each prompt.
        end_ids: ids that end a sequence (usually the end-of-document id); they are not part of the result.
        vocab_size: ids from here on are never chosen (the model may have more rows than the tokenizer has ids);
            None = all of the model's.
        on_token: called for every token; see `OnToken`.

    Raises:
        ConfigError: a prompt cannot be continued (see `check_prompts`), or the model is bidirectional.
    """
    check_prompts(model, prompts, max_new_tokens)
    device = next(model.parameters()).device
    ids_BT, segments_BT = left_pad(prompts)
    vocab_size = vocab_size or model.vocab_size
    uniform_SB = uniforms(settings.seed, prompts, max_new_tokens).T.contiguous().to(device)
    seen_BV = _seen(ids_BT, segments_BT, model.vocab_size)[:, :vocab_size].to(device)
    next_segments_B1 = None if segments_BT is None else torch.ones(len(prompts), 1, dtype=torch.long, device=device)
    rows = _Rows(len(prompts), end_ids, on_token)
    with evaluating(model):
        state = model.init_state(len(prompts), ids_BT.shape[1] + max_new_tokens)
        segments_BT = None if segments_BT is None else segments_BT.to(device)
        logits_B1V, state = model.decode(ids_BT.to(device), state, segment_ids_BS=segments_BT, last_only=True)
        for step in range(max_new_tokens):
            next_B = choose(logits_B1V[:, -1, :vocab_size], settings, uniform_SB[step], seen_BV)
            rows.take(next_B.tolist())
            if not rows.running or step == max_new_tokens - 1:
                break
            next_B1 = next_B[:, None]
            seen_BV.scatter_(1, next_B1, True)
            logits_B1V, state = model.decode(next_B1, state, segment_ids_BS=next_segments_B1, last_only=True)
    return [
        Generation(tuple(prompt), tuple(tokens), finish)
        for prompt, tokens, finish in zip(prompts, rows.tokens, rows.finish, strict=True)
    ]


def _seen(ids_BT: Tensor, segments_BT: Tensor | None, vocab_size: int) -> Tensor:
    """Which tokens each prompt holds, ``[B, V]`` bool; padding does not count."""
    real_BT = torch.ones_like(ids_BT) if segments_BT is None else segments_BT
    counts_BV = torch.zeros(ids_BT.shape[0], vocab_size, dtype=torch.long).scatter_add_(1, ids_BT, real_BT)
    return counts_BV > 0
