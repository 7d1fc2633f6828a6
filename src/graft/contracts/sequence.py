"""Contracts about who sees whom: causality, documents, padding, decoding."""

from __future__ import annotations

import torch
from torch import Tensor

from graft.config.families import TokenMixerConfig
from graft.contracts.subject import TOLERANCE, ContractBroken, Subject, assert_close
from graft.part import tensors_of

SEEN = 1e-13
"""Smallest effect, relative to the largest logit, that counts as being seen: above rounding, far below `TOLERANCE`,
because norms that saturate and states that hold on damp a token's effect without hiding it."""


def _mixes_tokens(subject: Subject) -> bool:
    parts = (part for layer in subject.config.layers() for part in layer)
    return any(isinstance(part, TokenMixerConfig) and part.mixes_tokens for part in parts)


@torch.no_grad()
def _effects(subject: Subject) -> Tensor:
    """[T, T]: largest change of the logits at column t when the token at row j changes, over the largest logit."""
    ids_1T = subject.tokens(1)
    ids_TT = ids_1T.repeat(subject.seq_len, 1)
    diagonal = torch.arange(subject.seq_len)
    ids_TT[diagonal, diagonal] = subject.other(ids_1T)[0]
    base_TV, changed_TTV = subject.model(ids_1T)[0], subject.model(ids_TT)
    return (changed_TTV - base_TV).abs().amax(-1) / base_TV.abs().max()


def never_looks_ahead(subject: Subject) -> None:
    """Changing a token changes nothing before it."""
    effects_TT = _effects(subject)
    leak = effects_TT.tril(-1)  # row j (changed) over column t (observed): t < j
    if leak.max() > TOLERANCE:
        j, t = divmod(int(leak.argmax()), subject.seq_len)
        raise ContractBroken(f"position {t} sees position {j}, which comes later (effect {leak.max():.3g})")


def looks_back(subject: Subject) -> None:
    """Changing a token changes something after it (a causal model that mixes tokens), and itself."""
    effects_TT = _effects(subject)
    if not (effects_TT.diagonal() > SEEN).all():
        raise ContractBroken("a position does not see its own token")
    if _mixes_tokens(subject) and not (effects_TT.diagonal(1) > SEEN).all():
        raise ContractBroken("a position does not see the token before it")


def looks_both_ways(subject: Subject) -> None:
    """Changing a token changes its neighbours on both sides (a bidirectional model that mixes tokens)."""
    effects_TT = _effects(subject)
    if not _mixes_tokens(subject):
        return
    for offset, side in ((1, "before"), (-1, "after")):
        if not (effects_TT.diagonal(offset) > SEEN).all():
            raise ContractBroken(f"a position does not see the token {side} it")


@torch.no_grad()
def documents_do_not_meet(subject: Subject) -> None:
    """Documents packed into one row compute what each computes alone."""
    lengths = [subject.seq_len // 3, 1, subject.seq_len - subject.seq_len // 3 - 1]
    documents = [subject.tokens(2, n, salt=f"document {i}") for i, n in enumerate(lengths)]
    segments = torch.cat([torch.full((2, n), i + 1) for i, n in enumerate(lengths)], dim=1)
    packed = subject.model(torch.cat(documents, dim=1), segment_ids_BT=segments)
    for i, (part, alone) in enumerate(zip(packed.split(lengths, dim=1), documents, strict=True)):
        assert_close(part, subject.model(alone), f"document {i + 1} of a packed row against itself alone")


@torch.no_grad()
def padding_does_not_matter(subject: Subject) -> None:
    """Padding on either side leaves the logits of real tokens as they are without it, whatever ids the padding has."""
    ids, pad = subject.tokens(2), 3
    expected = subject.model(ids)
    filler = subject.tokens(2, pad, salt="padding")
    real, none = torch.ones_like(ids), torch.zeros(2, pad, dtype=ids.dtype)
    right = subject.model(torch.cat([ids, filler], 1), segment_ids_BT=torch.cat([real, none], 1))
    left = subject.model(torch.cat([filler, ids], 1), segment_ids_BT=torch.cat([none, real], 1))
    assert_close(right[:, : subject.seq_len], expected, "padding on the right")
    assert_close(left[:, pad:], expected, "padding on the left")


def _splits(total: int) -> dict[str, list[int]]:
    """Ways to feed ``total`` tokens in calls."""
    odd = [5, 1, 3, 1]
    chunks: list[int] = []
    while sum(chunks) < total:
        chunks.append(min(odd[len(chunks) % len(odd)], total - sum(chunks)))
    half = total // 2
    return {"token by token": [1] * total, "prefill, then tokens": [half] + [1] * (total - half), "chunks": chunks}


@torch.no_grad()
def decoding_equals_forward(subject: Subject) -> None:
    """Prefill and decoding, token by token or in chunks, give the logits of one forward over the whole."""
    ids = subject.tokens(2)
    expected = subject.model(ids)
    for how, sizes in _splits(subject.seq_len).items():
        state = subject.model.init_state(2, subject.seq_len)
        outputs = []
        for chunk in ids.split(sizes, dim=1):
            logits, state = subject.model.decode(chunk, state)
            outputs.append(logits)
        assert_close(torch.cat(outputs, 1), expected, f"decoding {how} against one forward")


@torch.no_grad()
def batched_decoding_equals_single(subject: Subject) -> None:
    """Prompts of unequal length, padded on the left, decode as each does alone."""
    short, long = subject.seq_len // 3, subject.seq_len // 2
    ids = subject.tokens(2)
    pad = long - short
    prompts = ids[:, :long].clone()
    prompts[0] = torch.cat([subject.tokens(1, pad, salt="padding")[0], ids[0, :short]])
    segments = torch.ones_like(prompts)
    segments[0, :pad] = 0
    state = subject.model.init_state(2, subject.seq_len + pad)
    logits, state = subject.model.decode(prompts, state, segment_ids_BS=segments)
    rows = [[logits[0, pad:]], [logits[1]]]
    steps = subject.seq_len - long
    for i in range(steps):
        token = torch.stack([ids[0, short + i], ids[1, long + i]])[:, None]
        logits, state = subject.model.decode(token, state)
        rows[0].append(logits[0])
        rows[1].append(logits[1])
    assert_close(torch.cat(rows[0]), subject.model(ids[:1, : short + steps])[0], "the shorter prompt of a batch")
    assert_close(torch.cat(rows[1]), subject.model(ids[1:, : long + steps])[0], "the longer prompt of a batch")


@torch.no_grad()
def state_is_as_counted(subject: Subject) -> None:
    """What parts carry while decoding has the bytes they say (`Part.state_bytes`)."""
    model, length = subject.model, subject.seq_len
    state = model.init_state(1, length)
    for chunk in subject.tokens(1).split([length - 1, 1], dim=1):
        _, state = model.decode(chunk, state)
    for states in state.branches:
        for layer, block in enumerate(model.blocks()):
            for name, branch in block.branches():
                carried = sum(t.numel() * t.element_size() for t in tensors_of(states[layer][name]))
                counted = branch.part.state_bytes(length, torch.float64)
                if carried != counted:
                    raise ContractBroken(
                        f"layers.{layer}.{name} carries {carried} bytes and says {counted}; init_state must return a "
                        "state of the form that forward returns"
                    )
