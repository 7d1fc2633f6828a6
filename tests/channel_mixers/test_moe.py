"""The mixture of experts: closed form, what it costs, what balances it, what is counted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from graft.channel_mixers.moe import Moe
from graft.channel_mixers.moe_config import MoeConfig
from graft.config.model import InitConfig, ModelConfig
from graft.contracts.registry import contracts_for
from graft.contracts.subject import Subject
from graft.initialization import initialize
from graft.linears.bitlinear_config import BitLinearConfig
from graft.linears.dense_config import DenseConfig
from graft.norms.rms_norm_config import RMSNormConfig
from graft.objectives.causal_lm_config import CausalLMConfig
from graft.ops.activations import ACTIVATIONS
from graft.part import Context, Site, parameter_roles

B, T, D, FF, E = 2, 9, 10, 14, 6


def context(segments_BT: Tensor | None = None) -> Context:
    return Context(torch.zeros(B, T, dtype=torch.int64), torch.arange(T).expand(B, T), segments_BT)


def moe(init: InitConfig | None = None, **fields: Any) -> Moe:
    """In fp64, every parameter away from its quiet start; evaluating."""
    site = Site(D, 0, 4, 8, True, RMSNormConfig(), DenseConfig(), init or InitConfig(std=0.4))
    part = MoeConfig(**{"num_experts": E, "intermediate_size": FF, **fields}).build(site).double()
    initialize(part, 0)
    with torch.no_grad():
        for name, parameter in part.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    return part.eval()


VARIANTS: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "one of them": {"num_experts_per_tok": 1, "norm_topk_prob": False},
    "plain with biases": {"gated": False, "bias": True, "activation": "relu2", "num_experts_per_tok": 3},
    "gated with biases": {"bias": True, "activation": "gelu_tanh"},
    "all of them": {"num_experts_per_tok": E},
    "deepseek": {
        "scoring": "sigmoid", "routed_scaling_factor": 2.5, "num_groups": 3, "num_groups_per_tok": 2,
        "num_shared_experts": 2, "balance_bias_rate": 1e-3,
    },
    "qwen2": {"norm_topk_prob": False, "num_shared_experts": 1, "shared_expert_gate": True},
}  # fmt: skip


def network(part: Moe, e: int, x: Tensor) -> Tensor:
    """One expert on one position, as it is written in the papers."""
    experts = part.experts

    def map_of(linear: Any, z: Tensor) -> Tensor:
        return linear.weight[e] @ z + (0 if linear.bias is None else linear.bias[e])

    inner = experts.activation(map_of(experts.up_proj if experts.gate_proj is None else experts.gate_proj, x))
    return map_of(experts.down_proj, inner if experts.gate_proj is None else inner * map_of(experts.up_proj, x))


def by_hand(part: Moe, config: Any, x: Tensor) -> Tensor:
    """y of one position, with every expert tried and the choice made by sorting."""
    logits = part.router.weight @ x
    score = logits.softmax(0) if config.scoring == "softmax" else logits.sigmoid()
    biased = score if part.router.balance_bias is None else score + part.router.balance_bias
    allowed = list(range(E))
    if config.num_groups > 1:
        size = E // config.num_groups
        groups = [allowed[g * size : (g + 1) * size] for g in range(config.num_groups)]
        groups.sort(key=lambda group: -sum(sorted((float(biased[e].detach()) for e in group), reverse=True)[:2]))
        allowed = [e for group in groups[: config.num_groups_per_tok] for e in group]
    chosen = sorted(allowed, key=lambda e: -float(biased[e].detach()))[: config.num_experts_per_tok]
    total = sum(score[e] for e in chosen) if config.norm_topk_prob else 1.0
    y = sum(config.routed_scaling_factor * score[e] / total * network(part, e, x) for e in chosen)
    if part.shared_experts is not None:
        shared = part.shared_experts(x[None, None], context()).y[0, 0]
        y = y + (shared if part.shared_gate is None else (part.shared_gate.weight[0] @ x).sigmoid() * shared)
    return y


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_closed_form_and_its_gradients(name: str, kernels: str) -> None:
    part = moe(**VARIANTS[name])
    part.kernels = kernels
    if part.router.balance_bias is not None:
        part.router.balance_bias.normal_()
    x = torch.randn(B, T, D, dtype=torch.float64, requires_grad=True)
    y = part(x, context()).y
    expected = torch.stack([torch.stack([by_hand(part, part.config, x_D) for x_D in row]) for row in x])
    torch.testing.assert_close(y, expected, rtol=1e-11, atol=1e-12)
    direction = torch.randn_like(y)
    mine = torch.autograd.grad(y, [x, *part.parameters()], direction)
    other = torch.autograd.grad(expected, [x, *part.parameters()], direction)
    for actual, wanted in zip(mine, other, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-10, atol=1e-11)


def test_experts_that_are_not_chosen_change_nothing() -> None:
    part, x = moe(num_experts=16), torch.randn(1, 4, D, dtype=torch.float64)
    ctx = Context(torch.zeros(1, 4, dtype=torch.int64), torch.arange(4)[None])
    used = part.router(x).experts.unique()
    assert 2 <= len(used) < 16
    before = part(x, ctx).y
    idle = [e for e in range(16) if e not in used.tolist()]
    with torch.no_grad():
        for parameter in part.experts.parameters():
            parameter[idle] = torch.nan
    assert torch.equal(part(x, ctx).y, before)
    part(x, ctx).y.sum().backward()
    for parameter in part.experts.parameters():
        assert parameter.grad is not None
        assert not parameter.grad[idle].any()
        assert all(parameter.grad[e].any() for e in used.tolist())


def test_the_loss_reaches_the_router_through_the_weights_alone() -> None:
    part = moe(router_aux_loss_coef=0.0)
    x = torch.randn(B, T, D, dtype=torch.float64)
    out = part(x, context())
    assert not out.aux
    out.y.square().sum().backward()
    assert part.router.weight.grad is not None
    assert part.router.weight.grad.any()
    assert part.router(x).experts.dtype == torch.int64


def test_router_is_wide_whatever_the_precision() -> None:
    part = moe().float()
    x = torch.randn(B, T, D)
    exact = part.router(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside, out = part.router(x), part(x, context())
    assert torch.equal(inside.logits_BTE, exact.logits_BTE)
    assert torch.equal(inside.weights, exact.weights)
    assert out.y.dtype == torch.bfloat16
    assert part.bfloat16().router(x.bfloat16()).logits_BTE.dtype == torch.float32


def test_losses_are_weighted_sums_over_real_positions() -> None:
    """The values are those of `graft.ops.router_losses`; here: coefficients, padding, and one row at a time."""
    part = moe(router_aux_loss_coef=0.5, router_z_loss_coef=0.25)
    x = torch.randn(B, T, D, dtype=torch.float64)
    segments = torch.ones(B, T, dtype=torch.int64)
    segments[0, 5:] = 0
    aux = part(x, context(segments)).aux
    assert aux.keys() == {"router_balance", "router_z"}
    short = Context(torch.zeros(1, 5, dtype=torch.int64), torch.arange(5)[None])
    long = Context(torch.zeros(1, T, dtype=torch.int64), torch.arange(T)[None])
    for name, value in aux.items():
        alone = part(x[:1, :5], short).aux[name] + part(x[1:], long).aux[name]
        torch.testing.assert_close(value, alone)
        half = moe(router_aux_loss_coef=0.25, router_z_loss_coef=0.125)(x, context(segments)).aux[name]
        torch.testing.assert_close(value, 2 * half)


def test_balance_loss_pulls_towards_even_use() -> None:
    """Descending it alone spreads positions that all went to the same experts."""
    part = moe(num_experts_per_tok=1, norm_topk_prob=False)
    x = torch.randn(B, T, D, dtype=torch.float64)
    with torch.no_grad():
        part.router.weight.mul_(0.05)
        part.router.weight[0] += 0.2 * x.flatten(0, 1).mean(0)
    optimizer = torch.optim.SGD([part.router.weight], lr=0.5)
    loads = []
    for _ in range(60):
        loss = part(x, context()).aux["router_balance"]
        loads.append(part.router(x).experts.flatten().bincount(minlength=E).max().item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loads[-1] < loads[0]


def test_counts_are_of_real_positions_and_of_training() -> None:
    part, x = moe(), torch.randn(B, T, D, dtype=torch.float64)
    segments = torch.ones(B, T, dtype=torch.int64)
    segments[:, :4] = 0
    assert part(x, context(segments)).usage == {}
    part.train()
    counts = part(x, context(segments)).usage["experts"]
    assert counts.dtype == torch.int64
    assert not counts.requires_grad
    assert torch.equal(counts, part.router(x).experts[:, 4:].flatten().bincount(minlength=E))


def test_bias_follows_the_load_and_decides_without_weighing() -> None:
    part = moe(balance_bias_rate=0.125)
    part.after_update({"experts": torch.tensor([4, 0, 3, 3, 3, 5])})  # mean 3
    assert part.router.balance_bias is not None
    assert part.router.balance_bias.tolist() == [-0.125, 0.125, 0.0, 0.0, 0.0, -0.125]
    x = torch.randn(B, T, D, dtype=torch.float64)
    plain = moe()
    part.router.balance_bias.copy_(torch.tensor([9.0, 9.0, 0, 0, 0, 0]))
    biased, free = part.router(x), plain.router(x)
    assert biased.experts.unique().tolist() == [0, 1]
    assert len(free.experts.unique()) > 2
    chosen = free.probabilities_BTE.gather(-1, biased.experts)
    torch.testing.assert_close(biased.weights, chosen / chosen.sum(-1, keepdim=True))


def test_frozen_bias_stays() -> None:
    part = moe(balance_bias_rate=0.0)
    part.after_update({"experts": torch.tensor([4, 0, 3, 3, 3, 5])})
    assert part.router.balance_bias is not None
    assert not part.router.balance_bias.any()
    assert "router.balance_bias" in part.state_dict()
    assert "router.balance_bias" not in moe().state_dict()


@pytest.mark.parametrize("name", VARIANTS)
def test_counted_flops_and_parameters(name: str) -> None:
    part = moe(**VARIANTS[name])
    part.kernels = "reference"  # products that PyTorch counts
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        part(torch.randn(B, T, D, dtype=torch.float64), context())
    assert part.flops_per_token(T) * B * T == counter.get_total_flops()
    config: Any = part.config
    idle = E - config.num_experts_per_tok
    one = sum(p[0].numel() for p in part.experts.parameters())
    assert part.active_parameters() == sum(p.numel() for p in part.parameters()) - idle * one


def test_start() -> None:
    part, scaled = moe(InitConfig(std=0.02)), moe(InitConfig(std=0.02, residual="depth"))
    torch.testing.assert_close(scaled.experts.down_proj.weight, part.experts.down_proj.weight / 8**0.5)  # 8 branches
    assert torch.equal(scaled.experts.up_proj.weight, part.experts.up_proj.weight)
    assert 0.015 < part.experts.up_proj.weight.std() < 0.025
    assert 0.01 < part.router.weight.std() < 0.03
    assert not torch.equal(part.experts.up_proj.weight[0], part.experts.up_proj.weight[1])


def test_roles() -> None:
    roles = parameter_roles(moe(bias=True, num_shared_experts=1, shared_expert_gate=True))
    assert {name.split(".")[0] + "." + name.split(".")[-1]: role for name, role in roles.items()} == {
        "router.weight": "router",
        "experts.weight": "expert",
        "experts.bias": "bias",
        "shared_experts.weight": "mlp",
        "shared_experts.bias": "bias",
        "shared_gate.weight": "router",
    }


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_experts_per_tok": 7}, "7 of 6 experts"),
        ({"num_experts_per_tok": 1}, "learns nothing"),
        ({"shared_expert_gate": True}, "no shared expert"),
        ({"num_groups": 4, "num_groups_per_tok": 1}, "groups of equal size"),
        ({"num_groups": 3, "num_groups_per_tok": 4}, "4 of 3 groups"),
        ({"num_groups": 3}, "3 of 3 groups"),
        ({"num_groups_per_tok": 1}, "1 of 1 groups"),
        ({"num_groups": 3, "num_groups_per_tok": 1, "num_experts_per_tok": 3}, "fewer than the 3"),
        ({"scoring": "sigmoid", "router_z_loss_coef": 0.1}, "does nothing"),
    ],
)
def test_physics(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        MoeConfig(num_experts=E, intermediate_size=FF, **fields)


def test_advice() -> None:
    def advice(**fields: Any) -> list[str]:
        return [a.message for a in MoeConfig(num_experts=E, intermediate_size=FF, **fields).advice_in(D)]

    assert advice() == []
    assert advice(router_aux_loss_coef=0.0, balance_bias_rate=1e-3) == []
    assert ["nothing spreads" in text for text in advice(router_aux_loss_coef=0.0)] == [True]
    assert ["nothing is saved" in text for text in advice(num_experts_per_tok=E)] == [True]


def test_without_counts_nothing_moves() -> None:
    """An update made while evaluating has none."""
    part = moe(balance_bias_rate=0.125)
    part.after_update({})
    assert part.router.balance_bias is not None
    assert not part.router.balance_bias.any()


def test_what_experts_share_is_always_active() -> None:
    """A norm inside the experts' maps belongs to all of them."""
    site = Site(D, 0, 4, 8, True, RMSNormConfig(), BitLinearConfig(norm=RMSNormConfig()), InitConfig())
    part = MoeConfig(num_experts=E, intermediate_size=FF).build(site)
    own = 2 * 3 * D * FF  # two chosen, three matrices each
    assert part.active_parameters() == own + E * D + 2 * D + FF  # the router; norms of gate, up and down


CONTRACTED: dict[str, dict[str, Any]] = {
    "deepseek, looped": {"moe": {**VARIANTS["deepseek"], "router_aux_loss_coef": 0.1}, "loops": 2},
    "qwen2, encoder": {"moe": VARIANTS["qwen2"], "bidirectional": True},
    "odd sizes, biases": {"moe": {**VARIANTS["plain with biases"], "intermediate_size": 7}, "hidden_size": 6},
}


@pytest.mark.parametrize("name", CONTRACTED)
def test_contracts_of_other_kinds(name: str) -> None:
    """Beside those of the preset."""
    more = {"hidden_size": 12, **CONTRACTED[name]}
    experts = {"type": "moe", "num_experts": E, "intermediate_size": 8, **more.pop("moe")}
    mixer = {"type": "attention", "num_heads": 1, "position": {"type": "rope"}}
    config = {"num_layers": 2, "norm": {"type": "rms_norm"}, "blocks": {"b": [mixer, experts]}, **more}
    subject = Subject(ModelConfig.model_validate(config), CausalLMConfig())
    for contract in contracts_for(subject):
        contract(subject)


def test_every_activation_of_the_dense_network() -> None:
    assert all(moe(activation=name).experts.activation is ACTIVATIONS[name] for name in ACTIVATIONS)
