"""What the memory bank's config refuses, and what it suggests instead."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from graft.config.explain import explain
from graft.config.families import PartConfig
from graft.config.model import ModelConfig
from graft.memories.memory_bank_config import MemoryBankConfig


def model_data(*parts: dict[str, Any]) -> dict[str, Any]:
    blocks = {"b": [{"type": "memory_bank", "num_heads": 2, **part} for part in parts]}
    return {"hidden_size": 8, "num_layers": 2, "norm": {"type": "rms_norm"}, "blocks": blocks}


def problem(*parts: dict[str, Any]) -> str:
    data = model_data(*parts)
    with pytest.raises(ValidationError) as caught:
        ModelConfig.model_validate(data)
    issues = explain(caught.value, ModelConfig, data)
    assert len(issues) == 1, issues
    return f"{'.'.join(map(str, issues[0].path))}: {issues[0].problem}; {issues[0].fix}"


CHAPTERS = {"num_slots": 16, "num_chapters": 4, "top_k_chapters": 2}

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({}, "the bank has no size"),
    ({"num_chapters": 4}, "the bank has no size"),
    ({**CHAPTERS, "num_slots": 1024, "num_chapters": 100}, "num_slots 1000 or 1100, or num_chapters 128"),
    ({**CHAPTERS, "num_slots": 3, "num_chapters": 4}, "num_slots 4, or num_chapters 3"),
    ({**CHAPTERS, "chapter_size": 5}, "4 chapters of 5 are 20 slots, not num_slots 16"),
    ({**CHAPTERS, "top_k_chapters": 3, "num_shared_chapters": 2}, "2 shared and 3 chosen are more than 4"),
    ({**CHAPTERS, "top_k_chapters": 1, "router_aux_loss_coef": 0.0}, "the router never learns"),
    ({"num_slots": 4, "chapter_size": 4}, "chapter_size does nothing here"),
    ({"num_slots": 4, "routing": "rolling"}, "routing does nothing here"),
    ({**CHAPTERS, "routing_window": 3}, "routing_window does nothing here"),
    ({"num_slots": 4, "sharing_k": 3}, "sharing_k does nothing here"),
    ({"num_slots": 4, "rank": 3}, "rank does nothing here"),
    ({"num_slots": 4, "low_rank_mode": "factorized"}, "factorized slots need a rank"),
    ({"num_slots": 4, "low_rank_mode": "reduced_dim", "rank": 3}, "2 heads do not divide rank 3"),
    ({"num_slots": 4, "low_rank_mode": "reduced_dim", "rank": 4, "memory_dim": 6}, "memory_dim does nothing here"),
    ({"num_slots": 4, "num_kv_heads": 3}, "3 key heads do not divide 2 heads"),
    ({"num_slots": 4, "num_heads": 3}, "3 heads do not divide hidden_size 8"),
    ({"num_slots": 4, "gate": "scalar"}, "give each other no gradient"),
    ({"num_slots": 4, "quantization": {"group_size": 3}}, "groups of 3 do not divide 8 channels"),
    ({"num_slots": 4, "memory_dim": 5, "quantization": {"bits": 4}}, "even width, not 5"),
    ({"num_slots": 4, "bank": "mine", "sharing": "per_layer"}, "bank does nothing here"),
    ({"num_slots": 4, "bank": "My.Bank"}, "'My.Bank' is not allowed"),
]


@pytest.mark.parametrize(("part", "expected"), REFUSED, ids=lambda value: value if isinstance(value, str) else "")
def test_what_is_refused(part: dict[str, Any], expected: str) -> None:
    assert expected in problem(part)


def test_one_name_means_one_bank() -> None:
    assert "two parts share 'bank' and define it differently" in problem({"num_slots": 4}, {"num_slots": 6})
    ModelConfig.model_validate(model_data({"num_slots": 4}, {"num_slots": 6, "bank": "other"}))
    ModelConfig.model_validate(model_data({"num_slots": 4}, {"num_slots": 6, "sharing": "per_layer"}))
    ModelConfig.model_validate(model_data({"num_slots": 4}, {"num_slots": 4, "gate": "sigmoid"}))


def test_a_chapter_size_gives_the_number_of_slots() -> None:
    config = MemoryBankConfig(num_chapters=4, chapter_size=3, top_k_chapters=2, num_shared_chapters=1)
    assert (config.slots, config.routed_chapters, config.slots_read) == (12, 3, 9)
    assert MemoryBankConfig(num_slots=7).slots_read == 7


def test_advice_about_a_single_choice() -> None:
    def advice(**fields: Any) -> list[str]:
        part: PartConfig = MemoryBankConfig(**{**CHAPTERS, **fields})
        return [problem.message for problem in part.advice_in(8)]

    assert ["learns from its own losses alone" in line for line in advice(top_k_chapters=1)] == [True]
    assert advice() == []
