"""Which linear maps are replaced: by model.linear, by role, and what is never replaced unasked."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch.utils.flop_counter import FlopCounterMode

from graft.channel_mixers.experts import ExpertLinear
from graft.config.load import load_experiment_from_dict
from graft.config.model import InitConfig, ModelConfig
from graft.config.roles import ROLES
from graft.contracts import sequence, training
from graft.contracts.subject import Subject
from graft.cost.counts import part_costs
from graft.errors import ConfigError
from graft.linears.bitlinear import BitLinear, TernaryOperands
from graft.linears.bitlinear_config import BitLinearConfig
from graft.linears.dense import Dense, PlainOperands
from graft.linears.dense_config import DenseConfig
from graft.linears.low_rank import LowRank
from graft.linears.low_rank_config import LowRankConfig
from graft.model import Model, build_model
from graft.norms.rms_norm_config import RMSNormConfig
from graft.objectives.causal_lm_config import CausalLMConfig
from graft.optimizers.groups import named_trainable
from graft.optimizers.muon import takes_muon
from graft.part import Site
from graft.token_mixers.mla import MLA

ATTENTION = {"type": "attention", "num_heads": 2, "position": {"type": "rope"}}
MLP = {"type": "mlp", "intermediate_size": 24}
LATENT = {
    "type": "mla",
    "num_heads": 2,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 4,
    "v_head_dim": 4,
}
KINDS: dict[str, dict[str, Any]] = {
    "bitlinear": {"type": "bitlinear"},
    "low_rank": {"type": "low_rank", "rank": 5},
}


def config(*parts: dict[str, Any], **fields: Any) -> ModelConfig:
    return ModelConfig.model_validate(
        {"hidden_size": 16, "num_layers": 1, "norm": {"type": "rms_norm"}, "blocks": {"b": list(parts)}, **fields}
    )


def model(*parts: dict[str, Any], **fields: Any) -> Model:
    return build_model(config(*parts, **fields), 31, seed=0, device="meta")


def kinds(built: Model) -> Counter[tuple[str, str]]:
    """(kind, role) of every linear map that a part made."""
    return Counter(
        (type(m).__name__, m.role)
        for name, m in built.named_modules()
        if isinstance(m, Dense | LowRank) and not name.endswith((".down", ".up"))
    )


def test_every_map_is_dense_by_default() -> None:
    assert kinds(model(ATTENTION, MLP)) == {("Dense", "attention"): 4, ("Dense", "mlp"): 3}


def test_the_kind_of_a_role_wins_over_the_kind_of_all() -> None:
    built = model(ATTENTION, MLP, linear=KINDS["bitlinear"], linears={"mlp": KINDS["low_rank"]})
    assert kinds(built) == {("BitLinear", "attention"): 4, ("LowRank", "mlp"): 3}
    assert isinstance(built.embedding.weight, type(built.head_weight()))
    only = model(ATTENTION, MLP, linears={"attention": KINDS["bitlinear"]})
    assert kinds(only) == {("BitLinear", "attention"): 4, ("Dense", "mlp"): 3}


def test_the_kind_of_a_mixer_with_a_role_of_its_own() -> None:
    ode = {"type": "ode", "solver": "euler", "steps": 1, "mixer": ATTENTION}
    built = model(ode, linear=KINDS["bitlinear"], linears={"ode": {"type": "dense"}})
    assert kinds(built) == {("Dense", "ode"): 4}


@pytest.mark.parametrize("kind", KINDS)
def test_price_and_optimizer_of_replaced_maps(kind: str) -> None:
    shown = Subject(config(ATTENTION, MLP, linear=KINDS[kind]), CausalLMConfig())
    built = shown.build(dtype=torch.float32)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        state = built.init_state(1, 12)
        for token in shown.tokens(1).split(1, dim=1):
            _, state = built.decode(token, state)
    counted = sum(cost.forward_flops_per_token for cost in part_costs(built, 12, torch.float32))
    assert counted + built.head_flops_per_token() == pytest.approx(counter.get_total_flops() / 12, rel=1e-9)
    by_muon = {item.name for item in named_trainable(built) if takes_muon(item)}
    assert by_muon == {n for n, p in built.named_parameters() if ".part." in n and p.ndim == 2}


def test_routers_stay_dense_unless_named() -> None:
    def site(**linears: Any) -> Site:
        return Site(16, 0, 1, 2, True, RMSNormConfig(), BitLinearConfig(norm=None), InitConfig(), linears={**linears})

    assert type(site().make_linear(16, 4, role="router")) is Dense
    assert type(site().make_linear(16, 4, role="mlp")) is BitLinear
    named = site(router=LowRankConfig(rank=2))
    assert type(named.make_linear(16, 4, role="router")) is LowRank
    assert type(named.linear_of("expert")) is BitLinearConfig
    assert type(site(mlp=DenseConfig()).make_linear(16, 4, role="mlp")) is Dense


def test_an_entry_for_a_role_that_nothing_has_is_an_error() -> None:
    with pytest.raises(ConfigError) as caught:
        model(ATTENTION, MLP, linears={"mamba": KINDS["bitlinear"]})
    text = str(caught.value)
    assert "model.linears.mamba" in text
    assert "attention, mlp" in text
    assert "remove the entry" in text


def test_a_role_that_does_not_exist_is_a_problem_of_the_config() -> None:
    with pytest.raises(ValidationError, match="linears"):
        config(ATTENTION, linears={"attentoin": KINDS["bitlinear"]})
    assert config(ATTENTION, linears=dict.fromkeys(ROLES, KINDS["bitlinear"])).linears.keys() == set(ROLES)


def test_an_entry_of_the_base_can_be_taken_back(tmp_path: Path) -> None:
    data = {
        "model": config(ATTENTION, MLP, linears={"mlp": KINDS["low_rank"]}).to_dict(),
        "objective": {"type": "causal_lm"},
        "data": {"source": {"type": "embedded"}, "tokenizer": {"type": "bytes"}, "seq_len": 8},
        "optimizer": {"type": "adamw", "learning_rate": 1e-3},
        "schedule": {"type": "constant"},
        "training": {"max_steps": 1, "global_batch_size": 1},
    }
    assert load_experiment_from_dict(data).model.linears == {"mlp": LowRankConfig(rank=5)}
    assert load_experiment_from_dict(data, ["model.linears.mlp=null"]).model.linears == {}


MOE = {"type": "moe", "num_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 12}


def test_experts_follow_the_rule() -> None:
    assert isinstance(_expert(model(ATTENTION, MOE)).operands, PlainOperands)
    everywhere = model(ATTENTION, MOE, linear=KINDS["bitlinear"])
    assert isinstance(_expert(everywhere).operands, TernaryOperands)
    assert "router" not in {m.role for m in everywhere.modules() if isinstance(m, BitLinear)}
    named = model(ATTENTION, MOE, linears={"expert": KINDS["bitlinear"]})
    assert isinstance(_expert(named).operands, TernaryOperands)
    assert kinds(named)["Dense", "attention"] == 4


def _expert(built: Model) -> ExpertLinear:
    return next(m for m in built.modules() if isinstance(m, ExpertLinear))


@pytest.mark.parametrize("rule", [{"linear": KINDS["low_rank"]}, {"linears": {"expert": KINDS["low_rank"]}}])
def test_experts_that_cannot_follow_it_are_an_error(rule: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="'expert' come many at once and cannot be of the kind 'low_rank'") as caught:
        model(ATTENTION, MOE, **rule)
    assert "bitlinear, dense" in str(caught.value)
    assert "model.linears: {expert: {type: dense}}" in str(caught.value)
    model(ATTENTION, MOE, linear=KINDS["low_rank"], linears={"expert": {"type": "dense"}})


def test_ternary_experts_compute_what_ternary_maps_do() -> None:
    """Two equal experts, both taken by every position, are a feed-forward network of BitLinear maps."""
    two = {**MOE, "num_experts": 2}
    sparse, plain = (
        build_model(config(part, linear=KINDS["bitlinear"]), 31, seed=0, dtype=torch.float64)
        for part in (two, {**MLP, "intermediate_size": 12})
    )
    experts, mlp = (next(iter(m.blocks())) for m in (sparse, plain))
    weights = {n.split("experts.")[-1]: t for n, t in experts.named_parameters() if "experts" in n}
    for name, parameter in mlp.named_parameters():
        if "_proj" in name:
            source = weights[name.split("part.")[-1]]
            if source.ndim == 3:
                source.data[1] = source[0]
            parameter.data.copy_(source[0] if source.ndim == 3 else source)
    plain.embedding.load_state_dict(sparse.embedding.state_dict())
    ids = torch.randint(31, (2, 9))
    torch.testing.assert_close(sparse(ids), plain(ids), rtol=1e-10, atol=1e-10)


def test_contracts_hold_for_ternary_experts() -> None:
    subject = Subject(config(ATTENTION, MOE, linear=KINDS["bitlinear"]), CausalLMConfig())
    sequence.never_looks_ahead(subject)
    sequence.documents_do_not_meet(subject)
    sequence.padding_does_not_matter(subject)
    sequence.decoding_equals_forward(subject)
    training.micro_batches_add_up(subject)
    training.every_parameter_learns(subject)
    training.kernels_agree(subject)
    training.checkpointing_changes_nothing(subject)
    training.finite_in_bf16(subject)


@pytest.mark.parametrize("kind", KINDS)
def test_latent_attention_decodes_as_it_reads(kind: str) -> None:
    """A quantised map has no matrix that could be absorbed: decoding expands, and equals one forward."""
    subject = Subject(config({**LATENT, "q_lora_rank": 6}, MLP, linear=KINDS[kind]), CausalLMConfig())
    attention = next(m for m in subject.model.modules() if isinstance(m, MLA))
    assert not attention._absorbs(1, 1000)
    sequence.decoding_equals_forward(subject)
    sequence.batched_decoding_equals_single(subject)
    training.kernels_agree(subject)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mixer", ["retention", "mamba2", "conv"])
def test_contracts_hold_for_replaced_maps_in_other_mixers(mixer: str, kind: str) -> None:
    tables: dict[str, dict[str, Any]] = {
        "retention": {"type": "retention", "num_heads": 2},
        "mamba2": {"type": "mamba2", "d_state": 4, "head_dim": 8},
        "conv": {"type": "conv", "gated": True},
    }
    subject = Subject(config(tables[mixer], linear=KINDS[kind]), CausalLMConfig())
    sequence.never_looks_ahead(subject)
    sequence.documents_do_not_meet(subject)
    sequence.padding_does_not_matter(subject)
    sequence.decoding_equals_forward(subject)
    training.micro_batches_add_up(subject)
