"""Every token mixer beside every kind of routing, on ternary linear maps and convolved embeddings: who sees whom."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from subjects import PRESETS, experiment

from graft.config.families import PartConfig, TokenMixerConfig
from graft.config.model import ModelConfig
from graft.contracts.sequence import (
    decoding_equals_forward,
    documents_do_not_meet,
    looks_both_ways,
    never_looks_ahead,
    padding_does_not_matter,
)
from graft.contracts.subject import Subject
from graft.contracts.training import checkpointing_changes_nothing, kernels_agree
from graft.objectives.causal_lm_config import CausalLMConfig

CHAPTERS = {"type": "memory_bank", "num_slots": 12, "num_heads": 2, "num_chapters": 4, "top_k_chapters": 2}
ROUTED: dict[str, dict[str, Any]] = {
    "token": CHAPTERS,
    "rolling": {**CHAPTERS, "routing": "rolling", "routing_window": 3},
    "chunk": {**CHAPTERS, "routing": "chunk", "routing_chunk_size": 3},
    "prefix": {**CHAPTERS, "routing": "prefix", "routing_prefix_len": 4},
    "sequence": {**CHAPTERS, "routing": "sequence"},
    "moe": {"type": "moe", "num_experts": 4, "intermediate_size": 8},
    "peer": {"type": "peer", "product_key_dims": [4, 4], "num_experts_per_tok": 2, "num_heads": 2, "query_dim": 8},
}


def mixers() -> list[str]:
    return sorted(path.stem for path in PRESETS.glob("token_mixers/*.yaml"))


@cache
def shown(mixer: str) -> tuple[int, TokenMixerConfig]:
    """The width and the first token mixer of a mixer's preset."""
    model = experiment(PRESETS / "token_mixers" / f"{mixer}.yaml").model
    parts = [part for parts in model.blocks.values() for part in parts if isinstance(part, TokenMixerConfig)]
    return model.hidden_size, parts[0]


def crossing(mixer: str, routed: str, *, bidirectional: bool = False) -> Subject:
    hidden_size, part = shown(mixer)
    data = {
        "hidden_size": hidden_size,
        "num_layers": 2,
        "bidirectional": bidirectional,
        "norm": {"type": "rms_norm"},
        "embedding": {"conv": {"kernel_size": 4}, "size": 6},
        "blocks": {"crossing": [part.model_dump(mode="json", exclude_unset=True), ROUTED[routed]]},
        "linear": {"type": "bitlinear"},
    }
    return Subject(ModelConfig.model_validate(data), CausalLMConfig())


@pytest.mark.parametrize("routed", [name for name in ROUTED if name != "sequence"])
@pytest.mark.parametrize("mixer", mixers())
def test_decoders(mixer: str, routed: str) -> None:
    subject = crossing(mixer, routed)
    never_looks_ahead(subject)
    decoding_equals_forward(subject)


@pytest.mark.parametrize("mixer", mixers())
def test_documents_and_padding(mixer: str) -> None:
    for subject in (crossing(mixer, routed) for routed in ("rolling", "chunk", "peer")):
        documents_do_not_meet(subject)
        padding_does_not_matter(subject)


@pytest.mark.parametrize("mixer", [m for m in mixers() if shown(m)[1].supports_bidirectional])
def test_encoders(mixer: str) -> None:
    for subject in (crossing(mixer, routed, bidirectional=True) for routed in ("token", "sequence", "moe")):
        looks_both_ways(subject)
        documents_do_not_meet(subject)
        padding_does_not_matter(subject)


@pytest.mark.parametrize("mixer", mixers())
def test_inside_a_differential_equation_in_a_looped_stack(mixer: str) -> None:
    """Every evaluation of every loop has a state of its own."""
    hidden_size, part = shown(mixer)
    inside = part.model_dump(mode="json", exclude_unset=True, exclude=set(PartConfig.model_fields))
    data = {
        "hidden_size": hidden_size,
        "num_layers": 1,
        "loops": 2,
        "norm": {"type": "rms_norm"},
        "blocks": {"equation": [{"type": "ode", "solver": "heun", "branches": [inside, ROUTED["moe"]]}]},
    }
    subject = Subject(ModelConfig.model_validate(data), CausalLMConfig())
    for contract in (never_looks_ahead, decoding_equals_forward, documents_do_not_meet, padding_does_not_matter):
        contract(subject)
    checkpointing_changes_nothing(subject)
    kernels_agree(subject)
