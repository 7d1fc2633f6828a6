"""The control without mixing: what it gives, costs and carries, and that the contracts know it for a control."""

from __future__ import annotations

import pytest
import torch
from recurrent_checks import CPU, build, context

from graft.config.model import ModelConfig
from graft.contracts import sequence
from graft.contracts.subject import ContractBroken, Subject
from graft.objectives.causal_lm_config import CausalLMConfig
from graft.token_mixers.identity import Identity
from graft.token_mixers.identity_config import IdentityConfig


def test_it_gives_what_it_gets_and_costs_nothing():
    part = build(IdentityConfig())
    assert isinstance(part, Identity)
    x = torch.randn(2, 5, 24, dtype=torch.float64)
    out = part(x, context(x))
    assert torch.equal(out.y, x)
    assert out.state is None
    assert list(part.parameters()) == []
    assert part.flops_per_token(100) == 0
    assert part.state_bytes(100, torch.float32) == 0
    assert part.init_state(2, 9, device=CPU, dtype=torch.float32) is None


def subject(mixer: dict) -> Subject:
    blocks = {"b": [mixer, {"type": "mlp", "intermediate_size": 12}]}
    network = {"hidden_size": 8, "num_layers": 1, "norm": {"type": "rms_norm"}, "blocks": blocks}
    return Subject(ModelConfig.model_validate(network), CausalLMConfig())


def test_no_position_sees_another():
    effects = sequence._effects(subject({"type": "identity"}))
    assert torch.equal(effects != 0, torch.eye(effects.shape[0], dtype=torch.bool))


def test_the_contract_excuses_it_alone(monkeypatch):
    sequence.looks_back(subject({"type": "identity"}))
    monkeypatch.setattr(IdentityConfig, "mixes_tokens", True)
    with pytest.raises(ContractBroken, match="does not see the token before"):
        sequence.looks_back(subject({"type": "identity"}))
