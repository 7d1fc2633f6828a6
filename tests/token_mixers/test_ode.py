"""A mixer as a differential equation: what it is with one step, its states, its cost, its options."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from graft.config.advice import warnings
from graft.config.load import load_experiment_from_dict
from graft.config.model import InitConfig, ModelConfig
from graft.initialization import initialize
from graft.linears.dense_config import DenseConfig
from graft.model import Model, build_model
from graft.norms.rms_norm_config import RMSNormConfig
from graft.ops.runge_kutta import TABLEAUS, increment
from graft.part import Context, Site, parameter_roles
from graft.token_mixers.ode import Ode
from graft.token_mixers.ode_config import STAGES, OdeConfig
from graft.token_mixers.value_residual import VALUE_RESIDUAL

CPU = torch.device("cpu")
ATTENTION = {"type": "attention", "num_heads": 2, "position": {"type": "rope"}}
MLP = {"type": "mlp", "intermediate_size": 20}


def ode(*, dtype: torch.dtype = torch.float64, **fields: Any) -> Ode:
    if "branches" not in fields:
        fields = {"mixer": ATTENTION, **fields}
    config = OdeConfig.model_validate({"type": "ode", **fields})
    part = config.build(Site(16, 0, 2, 4, True, RMSNormConfig(), DenseConfig(), InitConfig(std=0.3)))
    initialize(part, seed=1)
    return part.to(dtype)


def context(x: Tensor, *, start: int = 0, segments: Tensor | None = None, **more: Any) -> Context:
    positions = torch.arange(start, start + x.shape[1]).expand(x.shape[:2])
    return Context(torch.zeros(x.shape[:2], dtype=torch.int64), positions, segments, **more)


def stream(T: int = 7) -> Tensor:
    return torch.randn(2, T, 16, dtype=torch.float64)


def model(parts: list[dict[str, Any]], dtype: torch.dtype = torch.float64, **fields: Any) -> Model:
    data = {"hidden_size": 16, "num_layers": 2, "norm": {"type": "rms_norm"}, "init": {"std": 0.3}, **fields}
    config = ModelConfig.model_validate({**data, "blocks": {"b": parts}})
    return build_model(config, 29, seed=3, dtype=dtype)


@torch.no_grad()
def with_weights_of(target: Model, source: Model, names: dict[str, str]) -> Model:
    """Copies every parameter of ``source``; ``names`` turns the start of its name into that of the target's."""
    mine = dict(target.named_parameters())
    for name, parameter in source.named_parameters():
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        mine.pop(name).copy_(parameter)
    assert not mine
    return target


def loss_and_gradients(network: Model, ids: Tensor) -> tuple[Tensor, list[Tensor]]:
    logits = network(ids)
    (logits * torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view(logits.shape)).sum().backward()
    return logits, [p.grad for p in network.parameters()]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("placement", ["pre", "sandwich"])
def test_one_euler_step_is_the_plain_branch_bit_for_bit(dtype, placement, autocast):
    options = {"norm_placement": placement, "residual_scale": 0.7, "norm": {"type": "rms_norm", "eps": 0.1}}
    options["layer_scale"] = 0.3
    plain = model([{**ATTENTION, **options}, MLP], dtype)
    wrapped = model([{"type": "ode", "mixer": ATTENTION, "solver": "euler", **options}, MLP], dtype)
    names = {"attention.norm": "ode.part.field.0.norm", "attention.part": "ode.part.field.0.part"}
    with_weights_of(wrapped, plain, {**names, "attention.": "ode."})
    ids = torch.randint(29, (2, 9))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        (logits, _), (wanted, _) = loss_and_gradients(wrapped, ids), loss_and_gradients(plain, ids)
    assert torch.equal(logits, wanted)
    theirs = dict(plain.named_parameters())
    for name, parameter in wrapped.named_parameters():
        original = name.replace("ode.part.field.0", "attention").replace("ode.", "attention.")
        assert torch.equal(parameter.grad, theirs[original].grad), name


def test_one_euler_step_of_branches_is_the_plain_block():
    plain = model([ATTENTION, MLP])
    wrapped = model([{"type": "ode", "branches": [ATTENTION, MLP], "solver": "euler"}])
    names = {"attention.": "ode.part.field.0.", "mlp.": "ode.part.field.1."}
    with_weights_of(wrapped, plain, names)
    ids = torch.randint(29, (2, 9))
    torch.testing.assert_close(wrapped(ids), plain(ids), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("placement", ["post", "output"])
def test_the_stream_enters_as_it_is_whatever_the_placement(placement):
    network = model([{"type": "ode", "mixer": ATTENTION}], norm_placement=placement)
    branch = next(b for _, b in next(network.blocks()).branches())
    assert branch.norm is None
    x = stream()
    y = branch.part(x, context(x)).y
    wanted = branch.post_norm(x + y) if placement == "post" else x + branch.output_norm(y)
    assert torch.equal(branch(x, context(x)).y, wanted)


@pytest.mark.parametrize("solver", STAGES)
@pytest.mark.parametrize("steps", [1, 3])
def test_the_part_integrates_its_field(solver, steps):
    part, x = ode(solver=solver, steps=steps), stream()
    ctx, inner = context(x), part.field[0]
    wanted = increment(lambda z, t, i: inner.part(inner.norm(z), ctx).y, x, TABLEAUS[solver], steps)
    assert torch.equal(part(x, ctx).y, wanted)
    assert STAGES[solver] == len(TABLEAUS[solver].nodes)


@pytest.mark.parametrize("solver", STAGES)
@pytest.mark.parametrize("window", [None, 3])
def test_decoding_equals_the_forward_with_a_state_per_evaluation(solver, window):
    inside = [{**ATTENTION, "sliding_window": window}, MLP]
    part, x = ode(solver=solver, steps=2, branches=inside, time_conditioning=solver == "rk4"), stream(11)
    segments = torch.tensor([[0, 0, 5, 5, 5, 5, 2, 2, 2, 2, 2], [4] * 11])
    with torch.no_grad():
        whole = part(x, context(x, segments=segments)).y
        state, pieces = part.init_state(2, 11, device=CPU, dtype=x.dtype), []
        for start, end in itertools.pairwise([0, 4, 5, 6, 9, 10, 11]):
            out = part(x[:, start:end], context(x[:, start:end], start=start, segments=segments[:, start:end]), state)
            state = out.state
            pieces.append(out.y)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-9, atol=1e-11)


def test_state_and_flops_are_those_of_every_evaluation():
    part, plain = ode(solver="rk4", steps=3), ode(solver="euler")
    assert part.state_bytes(50, torch.float32) == 12 * plain.state_bytes(50, torch.float32) == 12 * 50 * 2 * 16 * 4
    inner = part.parts()[0]
    state = part.init_state(2, 9, device=CPU, dtype=torch.float64)
    with FlopCounterMode(display=False) as counter:
        for t in range(9):
            x = stream(1)
            state = part(x, context(x, start=t), state).state
    assert counter.get_total_flops() == 2 * 9 * part.flops_per_token(9) == 2 * 9 * 12 * inner.flops_per_token(9)


def test_time_conditioning_starts_as_nothing_and_acts():
    part, plain, x = ode(solver="heun", time_conditioning=True), ode(solver="heun"), stream()
    plain.load_state_dict({n: p for n, p in part.state_dict().items() if "time" not in n})
    assert torch.equal(part(x, context(x)).y, plain(x, context(x)).y)
    u, v = torch.randn(2, 16, dtype=torch.float64)
    part.load_state_dict({"time_start": u, "time_end": v}, strict=False)
    inner, ctx = part.field[0], context(x)

    def f(z: Tensor) -> Tensor:
        return inner.part(inner.norm(z), ctx).y

    first = f(x + u)
    torch.testing.assert_close(part(x, ctx).y, (first + f(x + first + v)) / 2)


def test_learnable_coefficients_start_at_the_solvers():
    part, plain, x = ode(learnable_coefficients=True), ode(), stream()
    plain.load_state_dict({n: p for n, p in part.state_dict().items() if n != "weights"})
    torch.testing.assert_close(part(x, context(x)).y, plain(x, context(x)).y)
    with torch.no_grad():
        part.weights.copy_(torch.tensor([1.0, 0.0, 0.0, 0.0]))
    inner = part.field[0]
    torch.testing.assert_close(part(x, context(x)).y, inner.part(inner.norm(x), context(x)).y)
    weights = model([{"type": "ode", "mixer": ATTENTION, "learnable_coefficients": True}]).state_dict()
    assert weights["layers.1.ode.part.weights"].tolist() == [1 / 6, 1 / 3, 1 / 3, 1 / 6], "exact in fp64, too"


def test_roles():
    part = ode(branches=[ATTENTION, MLP], learnable_coefficients=True, time_conditioning=True)
    roles = parameter_roles(part)
    assert roles["weights"] == "scalar"
    assert roles["time_start"] == roles["time_end"] == "bias"
    assert roles["field.0.norm.weight"] == "norm"
    matrices = {role for name, role in roles.items() if name.endswith("proj.weight")}
    assert matrices == {"ode"}


def test_published_tensors_are_those_of_the_first_evaluation():
    part, x = ode(mixer={**ATTENTION, "value_residual": True}, steps=2), stream()
    inner = part.field[0]
    first = inner(x, context(x)).published[VALUE_RESIDUAL]
    assert torch.equal(part(x, context(x)).published[VALUE_RESIDUAL], first)
    later = torch.randn_like(first)
    out = part(x, context(x, published={VALUE_RESIDUAL: later}))
    assert VALUE_RESIDUAL not in out.published
    assert not torch.equal(out.y, part(x, context(x)).y), "what earlier layers published reaches f"


def test_sums_add_up_over_evaluations(monkeypatch):
    part, x = ode(solver="heun", steps=2), stream()
    inner = part.field[0].part
    original = type(inner).forward
    aux = {"load": torch.tensor(1.5)}
    monkeypatch.setattr(type(inner), "forward", lambda *a: original(*a)._replace(aux=aux))
    assert part(x, context(x)).aux["load"] == 4 * 1.5


def saved_elements(part: Ode, x: Tensor) -> int:
    """Numbers kept for the backward pass, each tensor counted once."""
    kept: dict[int, int] = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.update({t.untyped_storage().data_ptr(): t.numel()}) or t, lambda t: t
    ):
        part(x, context(x)).y.sum().backward()
    return sum(kept.values())


def test_checkpointing_keeps_no_activations_of_the_evaluations():
    x = stream().requires_grad_()
    plain, recomputing = ode(steps=4), ode(steps=4)
    recomputing.checkpointing = "block"
    kept = [saved_elements(part, x) for part in (plain, recomputing)]
    assert kept[1] < kept[0] / 4
    for a, b in zip(plain.parameters(), recomputing.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_the_model_tells_parts_about_checkpointing():
    network = model([{"type": "ode", "mixer": ATTENTION}])
    network.set_runtime(activation_checkpointing="block")
    assert {part.checkpointing for part in network.parts()} == {"block"}


def test_directions_and_mixing_are_those_of_the_parts_inside(monkeypatch):
    wrapped = OdeConfig.model_validate({"type": "ode", "mixer": {"type": "identity"}})
    assert (wrapped.supports_bidirectional, wrapped.mixes_tokens) == (True, False)
    both = OdeConfig.model_validate({"type": "ode", "branches": [MLP, ATTENTION]})
    assert both.mixes_tokens
    monkeypatch.setattr(type(wrapped.mixer), "supports_bidirectional", False)
    with pytest.raises(ValidationError, match="ode cannot be bidirectional"):
        model([{"type": "ode", "mixer": {"type": "identity"}}], bidirectional=True)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "exactly one of mixer and branches"),
        ({"mixer": ATTENTION, "branches": [MLP]}, "exactly one of mixer and branches"),
        ({"branches": []}, "f has no parts"),
        ({"mixer": {**ATTENTION, "layer_scale": 0.1}}, "layer_scale of a part inside does nothing"),
        ({"branches": [MLP, {**MLP, "norm": {"type": "rms_norm"}}]}, "norm of a part inside does nothing"),
        ({"mixer": ATTENTION, "solver": "euler", "time_conditioning": True}, "f is evaluated at time 0 alone"),
    ],
)
def test_what_cannot_be_is_a_problem(fields, message):
    with pytest.raises(ValidationError, match=message):
        OdeConfig.model_validate({"type": "ode", **fields})


def test_problems_and_advice_about_parts_inside_name_their_place():
    with pytest.raises(ValidationError, match="does not divide hidden_size 16") as raised:
        model([{"type": "ode", "mixer": {**ATTENTION, "num_heads": 3}}])
    assert raised.value.errors()[0]["ctx"]["problems"][0].path == ("blocks", "b", 0, "mixer", "num_heads")
    windowed = {"type": "ode", "branches": [MLP, {**ATTENTION, "sliding_window": 8}]}
    experiment = load_experiment_from_dict(
        {
            "model": {"hidden_size": 16, "num_layers": 1, "norm": {"type": "rms_norm"}, "blocks": {"b": [windowed]}},
            "objective": {"type": "causal_lm"},
            "data": {"source": {"type": "embedded"}, "tokenizer": {"type": "bytes"}, "seq_len": 8},
            "optimizer": {"type": "adamw", "learning_rate": 1e-3},
            "schedule": {"type": "cosine", "warmup_steps": 2},
            "training": {"max_steps": 10, "global_batch_size": 4},
        }
    )
    assert [w.split(":")[0] for w in warnings(experiment)] == ["model.blocks.b.0.branches.1.sliding_window"]


def test_an_equation_inside_an_equation():
    part, x = ode(mixer={"type": "ode", "mixer": ATTENTION, "solver": "euler"}, solver="euler"), stream()
    inner = part.field[0].part.field[0]
    assert part.field[0].norm is None
    assert torch.equal(part(x, context(x)).y, inner.part(inner.norm(x), context(x)).y)
