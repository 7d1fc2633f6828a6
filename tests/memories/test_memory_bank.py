"""The memory bank against PyTorch's own attention, in all its forms; no-op at the start; sharing, cost and roles."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from graft.config.model import InitConfig, ModelConfig
from graft.contracts.sequence import decoding_equals_forward, never_looks_ahead
from graft.contracts.subject import Subject, loud
from graft.contracts.training import every_parameter_learns, micro_batches_add_up
from graft.cost.counts import idle_shared_parameters
from graft.initialization import initialize
from graft.linears.bitlinear_config import BitLinearConfig
from graft.linears.dense_config import DenseConfig
from graft.memories.bank import banks
from graft.memories.memory_bank import MemoryBank
from graft.memories.memory_bank_config import MemoryBankConfig
from graft.model import build_model
from graft.norms.rms_norm_config import RMSNormConfig
from graft.objectives.causal_lm_config import CausalLMConfig
from graft.part import Context, Site, linear_flops, parameter_roles

D, N, M = 12, 3, 8
CHAPTERS = {"num_chapters": 4, "top_k_chapters": 2}


def memory_config(**fields: Any) -> MemoryBankConfig:
    return MemoryBankConfig.model_validate({"type": "memory_bank", "num_slots": M, "num_heads": N, **fields})


def site() -> Site:
    return Site(D, 0, 2, 4, True, RMSNormConfig(), DenseConfig(), InitConfig(std=0.3))


def memory(**fields: Any) -> MemoryBank:
    """A memory with a bank of its own, in fp64, all of it different from its quiet start."""
    part = memory_config(sharing="per_layer", **fields).build(site()).double()
    initialize(part, seed=1)
    loud(part, 0)
    return part


def context(x: Tensor, segments: Tensor | None = None) -> Context:
    ids = torch.zeros(x.shape[:2], dtype=torch.int64)
    return Context(ids, torch.arange(x.shape[1]).expand(ids.shape), segments)


def matrix(linear: nn.Module) -> Tensor:
    """The matrix of a linear map, made of its factors if it has any."""
    return linear.weight if isinstance(linear, nn.Linear) else linear.up.weight @ linear.down.weight


def slots_of(part: MemoryBank) -> Tensor:
    return part.bank.slots if part.bank.basis is None else part.bank.slots @ part.bank.basis


def torch_attention(part: MemoryBank, x: Tensor, slots: Tensor) -> Tensor:
    """What PyTorch's multi-head attention, with the part's weights by name, reads of slots. ``W_o`` is left out."""
    inner, heads = matrix(part.q_proj).shape[0], part.settings.num_heads

    def of_each_head(linear: nn.Module) -> Tensor:
        mine = matrix(linear).unflatten(0, (-1, part.head_dim))
        return mine.repeat_interleave(heads // len(mine), dim=0).flatten(0, 1)

    oracle = nn.MultiheadAttention(inner, heads, bias=False, kdim=slots.shape[1], vdim=slots.shape[1], batch_first=True)
    weights = {
        "q_proj_weight": torch.eye(inner, dtype=x.dtype),
        "k_proj_weight": of_each_head(part.k_proj),
        "v_proj_weight": of_each_head(part.v_proj),
        "out_proj.weight": torch.eye(inner, dtype=x.dtype),
    }
    if oracle.in_proj_weight is not None:  # keys and values as wide as queries: one matrix for all three
        weights = {
            "in_proj_weight": torch.cat([weights.pop(f"{name}_proj_weight") for name in "qkv"]),
            "out_proj.weight": weights["out_proj.weight"],
        }
    queries = x @ matrix(part.q_proj).T
    keys = slots.expand(x.shape[0], -1, -1)
    read, _ = torch.func.functional_call(oracle.double(), weights, (queries, keys, keys), {"need_weights": False})
    return read


def same(ours: Tensor, theirs: Tensor, part: nn.Module, x: Tensor) -> None:
    """Values, and gradients of the input and of every parameter."""
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-11)
    upstream = torch.randn_like(ours)
    inputs = [x, *part.parameters()]
    actual, expected = (torch.autograd.grad(y, inputs, upstream, allow_unused=True) for y in (ours, theirs))
    for a, e in zip(actual, expected, strict=True):
        assert a is not None
        assert e is not None
        assert a.any()
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-10)


FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "other width": {"memory_dim": 5, "head_dim": 2},
    "factorized": {"low_rank_mode": "factorized", "rank": 3, "memory_dim": 10},
    "reduced_dim": {"low_rank_mode": "reduced_dim", "rank": 6},
    "low-rank projections": {"projection_rank": 2},
    "one key head": {"num_kv_heads": 1},
    "two key heads of low rank": {"num_heads": 4, "num_kv_heads": 2, "low_rank_mode": "factorized", "rank": 3},
    "both": {"low_rank_mode": "factorized", "rank": 3, "projection_rank": 2, "head_dim": 2},
}


def in_order(part: MemoryBank, order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The part reads its slots in one of the ways it has, whatever the number of positions would suggest."""
    part.kernels = "reference" if order == "reference" else "auto"
    monkeypatch.setattr(MemoryBank, "_absorbs", lambda *_: order == "absorbed")


@pytest.mark.parametrize("order", ["projected", "absorbed", "reference"])
@pytest.mark.parametrize("form", FORMS)
def test_equals_torch_attention(form: str, order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    part = memory(**FORMS[form])
    in_order(part, order, monkeypatch)
    x = torch.randn(2, 5, D, dtype=torch.float64, requires_grad=True)
    theirs = torch_attention(part, x, slots_of(part)) @ matrix(part.o_proj).T
    same(part(x, context(x)).y, theirs, part, x)


@pytest.mark.parametrize("order", ["projected", "absorbed", "reference"])
@pytest.mark.parametrize("T", [1, 30])  # few positions project only the chapters they read
@pytest.mark.parametrize(
    "fields", [{}, {"num_shared_chapters": 1, "routed_scaling_factor": 2.5}, FORMS["factorized"], FORMS["one key head"]]
)
def test_chapters_equal_torch_attention_to_each(
    fields: dict[str, Any], T: int, order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = memory(**{**CHAPTERS, **fields}, router_aux_loss_coef=0.0)
    in_order(part, order, monkeypatch)
    x = torch.randn(1, T, D, dtype=torch.float64, requires_grad=True)
    router, shared = part.router, part.settings.num_shared_chapters
    assert router is not None
    p = (x @ router.weight.T + router.bias).softmax(-1)
    best = p.topk(2, -1).indices
    weights = torch.zeros_like(p).scatter(-1, best, p.gather(-1, best))
    weights = part.settings.routed_scaling_factor * weights / weights.sum(-1, keepdim=True)
    weights = torch.cat([torch.ones(1, T, shared, dtype=torch.float64), weights], -1)
    chapters = slots_of(part).split(M // 4)
    read = sum(weights[..., c, None] * torch_attention(part, x, slots) for c, slots in enumerate(chapters))
    same_values = part(x, context(x)).y
    theirs = read @ matrix(part.o_proj).T
    if T == 1:  # some chapters are not read, so some gradients are zero
        torch.testing.assert_close(same_values, theirs, rtol=1e-10, atol=1e-11)
    else:
        same(same_values, theirs, part, x)


def test_the_gates() -> None:
    x = torch.randn(2, 5, D, dtype=torch.float64)
    plain, scalar, sigmoid = (
        memory(gate=gate, zero_init_output=gate != "scalar") for gate in ("none", "scalar", "sigmoid")
    )
    for gated in (scalar, sigmoid):
        gated.load_state_dict(plain.state_dict(), strict=False)
    y = plain(x, context(x)).y
    torch.testing.assert_close(scalar(x, context(x)).y, scalar.gate.value.tanh() * y)
    factor = torch.sigmoid(x @ sigmoid.gate.weight + sigmoid.gate.bias)[..., None]
    torch.testing.assert_close(sigmoid(x, context(x)).y, factor * y)


def test_dropout_acts_in_training_alone() -> None:
    part = memory(attention_dropout=0.5, **CHAPTERS)
    x = torch.randn(1, 4, D, dtype=torch.float64)
    trained = [part.train()(x, context(x)).y for _ in range(2)]
    assert not torch.equal(*trained)
    evaluated = [part.eval()(x, context(x)).y for _ in range(2)]
    assert torch.equal(*evaluated)


def model_config(*parts: dict[str, Any], **fields: Any) -> ModelConfig:
    attention = {"type": "attention", "num_heads": 2, "position": {"type": "rope"}}
    mlp = {"type": "mlp", "intermediate_size": 12}
    blocks = {"b": [attention, *({"type": "memory_bank", "num_slots": 8, "num_heads": 2, **p} for p in parts), mlp]}
    norm = {"type": "rms_norm"}
    return ModelConfig.model_validate(
        {"hidden_size": 8, "num_layers": 4, "norm": norm, "blocks": blocks, "vocab_size": 19, **fields}
    )


STARTS: dict[str, dict[str, Any]] = {
    "zero output": {},
    "zero output, sigmoid gate": {"gate": "sigmoid"},
    "zero gate": {"gate": "scalar", "zero_init_output": False},
    "chapters": {"num_chapters": 4, "top_k_chapters": 2},
    "low rank": {"low_rank_mode": "factorized", "rank": 2, "projection_rank": 2},
}


@pytest.mark.parametrize("init", [{}, {"residual": "depth"}], ids=["plain", "depth"])
@pytest.mark.parametrize("name", STARTS)
def test_the_start_is_that_of_a_model_without_memory_bit_for_bit(name: str, init: dict[str, Any]) -> None:
    ids = torch.randint(19, (2, 9))
    without = build_model(model_config({**STARTS[name], "layers": "none"}, init=init), 19, seed=3)
    model = build_model(model_config(STARTS[name], init=init), 19, seed=3)
    assert torch.equal(model(ids), without(ids))
    shared = dict(without.named_parameters())
    assert all(torch.equal(p, shared[name]) for name, p in model.named_parameters() if name in shared)
    assert model.num_parameters() > without.num_parameters()
    loud(model, 0)
    loud(without, 0)
    assert not torch.equal(model(ids), without(ids))


@pytest.mark.parametrize("name", STARTS)
def test_it_leaves_the_start(name: str) -> None:
    """The output's map (or the gate) learns from the first step on, everything else from the second."""
    model = build_model(model_config(STARTS[name]), 19, seed=3)
    ids = torch.randint(19, (2, 9))
    for _ in range(2):
        model.zero_grad()
        model(ids)[:, :, 1].sum().backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.1 * parameter.grad if parameter.grad is not None else 0.0
    model.zero_grad()
    model(ids)[:, :, 1].sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_sharing() -> None:
    def slots(**fields: Any) -> list[str]:
        model = build_model(model_config(fields), 19, seed=0, device="meta")
        return [name for name, _ in model.named_parameters() if "slots" in name]

    assert slots() == ["shared.bank.slots"]
    assert slots(bank="facts", layers={"last": 1}) == ["shared.facts.slots"]
    assert slots(sharing="per_layer", layers=[1, 3]) == [f"layers.{i}.memory_bank.part.bank.slots" for i in (1, 3)]
    assert slots(sharing="every_k", sharing_k=3) == ["shared.bank_0.slots", "shared.bank_1.slots"]
    # of layers 0, 2, 3 the first two read one bank: groups count the layers that have the memory
    model = build_model(model_config({"sharing": "every_k", "layers": [0, 2, 3]}), 19, seed=0)
    first, second, third = (part for part in model.parts() if isinstance(part, MemoryBank))
    assert first.bank is second.bank
    assert third.bank is not second.bank
    assert len(banks(model)) == 2


def test_a_shared_bank_is_saved_once_and_read_by_all() -> None:
    model = build_model(model_config({}), 19, seed=0)
    loud(model, 1)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert sum("slots" in name for name in state) == 1
    ids = torch.randint(19, (1, 6))
    before = model(ids)
    with torch.no_grad():
        model.shared["bank"].slots.zero_()
    zeroed = model(ids)
    assert not torch.equal(zeroed, before)
    model.load_state_dict(state)
    assert torch.equal(model(ids), before)  # the parts read what is in the model now
    copied = copy.deepcopy(model)
    readers = [part for part in copied.modules() if isinstance(part, MemoryBank)]
    assert all(part.bank is copied.shared["bank"] for part in readers)
    assert copied.shared["bank"] is not model.shared["bank"]


def test_two_memories_of_one_name_read_one_bank() -> None:
    model = build_model(model_config({"head_dim": 4}, {"head_dim": 2}), 19, seed=0, device="meta")
    assert [name for name, _ in model.named_parameters() if "slots" in name] == ["shared.bank.slots"]
    names = [name for name, _ in model.named_parameters()]
    assert "layers.0.memory_bank_2.part.q_proj.weight" in names


def test_roles() -> None:
    part = {**CHAPTERS, "routing": "chunk", "gate": "sigmoid", "low_rank_mode": "factorized", "rank": 2}
    model = build_model(model_config(part), 19, seed=0, device="meta")
    everywhere, prefix = parameter_roles(model), "layers.0.memory_bank.part."
    assert {name.removeprefix(prefix): role for name, role in everywhere.items() if name.startswith(prefix)} == {
        **{f"{name}_proj.weight": "memory_layer" for name in "qkvo"},
        "router.weight": "router",
        "router.bias": "bias",
        "router.start": "bias",
        "gate.weight": "scalar",
        "gate.bias": "bias",
    }
    assert everywhere["shared.bank.slots"] == everywhere["shared.bank.basis"] == "memory_bank"


def traced(part: MemoryBank, T: int) -> float:
    x = torch.randn(1, T, D, dtype=torch.float64)
    part.requires_grad_(False)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        part(x, context(x))
    return counter.get_total_flops() / T


@pytest.mark.parametrize("form", FORMS)
def test_flops_equal_those_traced(form: str) -> None:
    part = memory(**FORMS[form])
    assert part.flops_per_token(7) == pytest.approx(traced(part, 7), rel=1e-9)


@pytest.mark.parametrize("T", [1, 7])  # seven positions of two chapters are pairs of their own: nothing is padded
@pytest.mark.parametrize("fields", [{}, {"num_shared_chapters": 1}, FORMS["factorized"]])
def test_flops_of_chapters_equal_those_traced(fields: dict[str, Any], T: int) -> None:
    part = memory(**{**CHAPTERS, **fields})
    assert part.flops_per_token(T) == pytest.approx(traced(part, T), rel=1e-9)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("chapters", [{}, CHAPTERS])
def test_one_position_does_not_map_every_slot(form: str, chapters: dict[str, Any]) -> None:
    """Decoding would else make all keys and values anew for every token."""
    part = memory(**{**FORMS[form], **chapters, "num_slots": 400})
    traced_flops = traced(part, 1)
    assert part.flops_per_token(1) == pytest.approx(traced_flops, rel=1e-9)
    width = part.settings.kv_heads * part.head_dim
    every_slot = sum(part.bank.flops(400, linear_flops(m), width) for m in (part.k_proj, part.v_proj))
    assert traced_flops < every_slot


def test_maps_that_are_more_than_a_matrix_are_applied_to_the_slots() -> None:
    config = memory_config(sharing="per_layer", num_slots=400)
    part = config.build(replace(site(), linear=BitLinearConfig())).double()
    initialize(part, seed=1)
    loud(part, 0)
    x = torch.randn(1, 1, D, dtype=torch.float64)
    y = part(x, context(x)).y
    part.kernels = "reference"
    torch.testing.assert_close(y, part(x, context(x)).y, rtol=1e-10, atol=1e-11)
    assert part.flops_per_token(1) == pytest.approx(traced(part, 1), rel=1e-9)


def test_active_parameters() -> None:
    part = memory(**{**CHAPTERS, "num_shared_chapters": 1})
    unread = M // 4 * D
    assert part.active_parameters() == sum(p.numel() for p in part.parameters()) - unread
    assert memory().active_parameters() == sum(p.numel() for p in memory().parameters())
    assert linear_flops(part) == 2 * 4 * D * D


STATES = {
    "token": 0,
    "rolling": 4 * (4 + 1) * 4 + 16,  # window - 1 columns of E scores and a count, fp32, and two whole numbers
    "chunk": 2 * (4 + 1) * 4 + 16,
    "prefix": (4 + 1) * 4 + 16,
}


@pytest.mark.parametrize("routing", STATES)
def test_state_bytes(routing: str) -> None:
    fields = {"routing_window": 5} if routing == "rolling" else {}
    part = memory(**CHAPTERS, routing=routing, **fields)
    assert part.state_bytes(64, torch.bfloat16) == STATES[routing]
    assert memory().state_bytes(64, torch.bfloat16) == 0


def test_100k_slots_read_by_token_routing() -> None:
    """Sorted by chapter, nothing is copied per query: the reference would need every position times every slot."""
    part = memory_config(sharing="per_layer", num_slots=100_000, num_chapters=1000, top_k_chapters=3).build(site())
    initialize(part, seed=1)
    loud(part, 0)
    x = torch.randn(1, 512, D)
    with FlopCounterMode(display=False) as counter:
        y = part(x, context(x)).y
    y.sum().backward()
    choice, _ = part.router(x, None, None)
    for t in (0, 200, 511):
        expected = torch.zeros(N, D // N)
        for chapter, weight in zip(choice.chapters_BTC[0, t], choice.weights_BTC[0, t], strict=True):
            slots = part.bank.slots[chapter * 100 : chapter * 100 + 100]
            q, k, v = (
                p(z).unflatten(-1, (N, -1))
                for p, z in ((part.q_proj, x[0, t]), (part.k_proj, slots), (part.v_proj, slots))
            )
            scores = torch.einsum("nh,mnh->nm", q, k) / (D // N) ** 0.5
            expected += weight * torch.einsum("nm,mnh->nh", scores.softmax(-1), v)
        torch.testing.assert_close(y[0, t], part.o_proj(expected.flatten()), rtol=1e-3, atol=1e-4)
    assert counter.get_total_flops() < 1.3 * 512 * part.flops_per_token(512)


def test_active_parameters_of_shared_banks() -> None:
    """A position reads at most what its layers read, and no more than there is."""
    size, half = 8 * 8, 8 * 8 // 2  # 8 slots of width 8; two of four chapters
    fields = {**CHAPTERS, "num_slots": 8}

    def idle(*parts: dict[str, Any]) -> int:
        return idle_shared_parameters(build_model(model_config(*parts), 19, seed=0, device="meta"))

    assert idle({**fields, "layers": [1]}) == size - half
    assert idle({**fields, "layers": [1, 2]}) == 0
    assert idle(fields) == 0
    assert idle({**fields, "sharing": "every_k", "sharing_k": 1}) == 4 * (size - half)
    assert idle({**fields, "sharing": "per_layer"}) == 0
    assert idle({"layers": [1]}) == 0


@pytest.mark.parametrize("form", [{}, {"low_rank_mode": "factorized", "rank": 16}])
def test_slots_start_with_the_deviation_asked_for(form: dict[str, Any]) -> None:
    part = memory_config(sharing="per_layer", **{"num_slots": 2000, "init_std": 0.05, "memory_dim": 64, **form}).build(
        site()
    )
    initialize(part, seed=0)
    assert slots_of(part).std().item() == pytest.approx(0.05, rel=0.1)
    assert not part.o_proj.weight.any()


def test_inside_a_differential_equation_in_loops() -> None:
    """Each evaluation of f, in each loop, has a state of its own; the bank is one."""
    attention = {"type": "attention", "num_heads": 2, "position": {"type": "rope"}}
    memory = {
        "type": "memory_bank",
        "num_slots": 8,
        "num_heads": 2,
        **CHAPTERS,
        "routing": "rolling",
        "routing_window": 3,
    }
    blocks = {"b": [{"type": "ode", "branches": [attention, memory], "solver": "midpoint"}]}
    config = {"hidden_size": 8, "num_layers": 2, "loops": 2, "norm": {"type": "rms_norm"}, "blocks": blocks}
    subject = Subject(ModelConfig.model_validate(config), CausalLMConfig())
    assert len(banks(subject.model)) == 1
    assert parameter_roles(subject.model)["shared.bank.slots"] == "memory_bank"
    for contract in (decoding_equals_forward, never_looks_ahead, every_parameter_learns, micro_batches_add_up):
        contract(subject)
