"""A convolution over embeddings before every token mixer: no position looks ahead, no document or padding is seen."""

from __future__ import annotations

import pytest
from subjects import PRESETS, experiment

from graft.config.registry import variants
from graft.contracts import sequence
from graft.contracts.subject import Subject

CONVS = {"full": {"kernel_size": 4}, "depthwise": {"kernel_size": 3, "depthwise": True}}
MIXERS = sorted(variants("token_mixer"))
EXPERTS = {"type": "moe", "num_experts": 3, "intermediate_size": 6}


def subject(mixer: str, conv: str, *, bidirectional: bool, with_experts: bool = False) -> Subject:
    """The network of the mixer's own preset behind a factorised table and a convolution.

    ``with_experts`` also has a mixture of experts in every block, and ternary linear maps.
    """
    shown = experiment(PRESETS / "token_mixers" / f"{mixer}.yaml")
    model = shown.model
    changes = {"embedding": {"size": 6, "conv": CONVS[conv]}, "bidirectional": bidirectional}
    if with_experts:
        blocks = {name: [*(p.to_dict() for p in parts), EXPERTS] for name, parts in model.blocks.items()}
        changes |= {"blocks": blocks, "linear": {"type": "bitlinear"}}
    return Subject.of(shown.replace(model=type(model).model_validate(model.to_dict() | changes)))


@pytest.mark.parametrize("conv", CONVS)
@pytest.mark.parametrize("mixer", MIXERS)
def test_decoders(mixer: str, conv: str) -> None:
    examined = subject(mixer, conv, bidirectional=False)
    sequence.never_looks_ahead(examined)
    sequence.looks_back(examined)
    sequence.documents_do_not_meet(examined)
    sequence.padding_does_not_matter(examined)
    sequence.batched_decoding_equals_single(examined)


@pytest.mark.parametrize("mixer", MIXERS)
def test_decoders_with_experts_and_ternary_maps(mixer: str) -> None:
    examined = subject(mixer, "full", bidirectional=False, with_experts=True)
    sequence.never_looks_ahead(examined)
    sequence.documents_do_not_meet(examined)


@pytest.mark.parametrize("mixer", MIXERS)
def test_encoders(mixer: str) -> None:
    examined = subject(mixer, "full", bidirectional=True)
    sequence.looks_both_ways(examined)
    sequence.documents_do_not_meet(examined)
    sequence.padding_does_not_matter(examined)
