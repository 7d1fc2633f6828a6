"""Muon against torch.optim.Muon and a plain fp64 form; who gets it; its state."""

import pytest
import torch
from torch import nn

import graft.optimizers.muon as muon_module
from graft.errors import ConfigError
from graft.optimizers.adamw_config import AdamWConfig
from graft.optimizers.groups import set_learning_rate
from graft.optimizers.groups_config import RoleOverride
from graft.optimizers.muon import batches, update_scale
from graft.optimizers.muon_config import MuonConfig

MUON_NAMES = {"attention.q", "attention.o", "mlp.up", "mlp.up2", "mlp.down", "experts.w"}


def run(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        model.fill_gradients(step)
        optimizer.step()


def reference(theta, gradients, *, lr, decay, momentum, nesterov, scale):
    """The update rule on one matrix, step by step, in its own precision, by singular values."""
    m = torch.zeros_like(theta)
    for g in gradients:
        m = momentum * m + g
        direction = g + momentum * m if nesterov else m
        u, s, vt = torch.linalg.svd(direction / direction.norm(), full_matrices=False)
        for _ in range(5):
            s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
        rows, cols = theta.shape
        factor = max(1, rows / cols) ** 0.5 if scale == "spectral" else 0.2 * max(rows, cols) ** 0.5
        theta = theta - lr * decay * theta - lr * factor * (u @ torch.diag(s) @ vt)
    return theta


@pytest.mark.parametrize("scale", ["spectral", "match_rms_adamw"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_equals_the_plain_form(tiny_model, scale, nesterov: bool):
    model = tiny_model().double()
    config = MuonConfig(
        learning_rate=0.02, weight_decay=0.3, momentum=0.9, nesterov=nesterov, scale=scale, ns_dtype="float32"
    )
    optimizer, start = config.build(model), model.values()
    run(model, optimizer, range(3))
    gradients = []
    for step in range(3):
        model.fill_gradients(step)
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    settings = {"lr": 0.02, "decay": 0.3, "momentum": 0.9, "nesterov": nesterov, "scale": scale}
    for name, value in model.values().items():
        if name not in MUON_NAMES:
            continue
        pieces = zip(start[name], value, strict=True) if value.ndim == 3 else [(start[name], value)]
        for i, (before, after) in enumerate(pieces):
            grads = [g[name][i] if value.ndim == 3 else g[name] for g in gradients]
            torch.testing.assert_close(after, reference(before, grads, **settings), rtol=0, atol=2e-6)


@pytest.mark.parametrize(("scale", "adjust"), [("spectral", "original"), ("match_rms_adamw", "match_rms_adamw")])
@pytest.mark.parametrize("nesterov", [True, False])
def test_equals_torch_muon(tiny_model, scale, adjust: str, nesterov: bool):
    """torch averages the momentum (a factor on M that normalisation removes) and works in bf16: equal up to that."""
    ours, theirs = tiny_model(), tiny_model()
    config = MuonConfig(
        learning_rate=0.02, weight_decay=0.3, momentum=0.9, nesterov=nesterov, scale=scale, ns_dtype="bfloat16"
    )
    optimizer = config.build(ours)
    matrices = [p for name, p in theirs.named_parameters() if name in MUON_NAMES and p.ndim == 2]
    oracle = torch.optim.Muon(matrices, lr=0.02, weight_decay=0.3, momentum=0.9, nesterov=nesterov, adjust_lr_fn=adjust)
    start = theirs.values()
    run(ours, optimizer, range(3))
    run(theirs, oracle, range(3))
    for name in MUON_NAMES - {"experts.w"}:
        moved = (theirs.values()[name] - start[name]).norm()
        assert (ours.values()[name] - theirs.values()[name]).norm() < 0.02 * moved


def test_everything_else_gets_adamw(tiny_model):
    ours, theirs = tiny_model(), tiny_model()
    optimizer = MuonConfig(learning_rate=0.02, betas=(0.8, 0.9), eps=1e-4, adamw_lr_multiplier=0.25).build(ours)
    oracle = AdamWConfig(learning_rate=0.02 * 0.25, betas=(0.8, 0.9), eps=1e-4).build(theirs)
    run(ours, optimizer, range(3))
    run(theirs, oracle, range(3))
    muon_ids = {id(p) for g in optimizer.param_groups if g["algorithm"] == "muon" for p in g["params"]}
    names = {name for name, p in ours.named_parameters() if id(p) in muon_ids}
    assert names == MUON_NAMES  # no embedding, head, norm, bias, scalar, router, bank, convolution, nor a 1×n matrix
    for name, value in ours.values().items():
        same = torch.equal(value, theirs.values()[name])
        assert same == (name not in MUON_NAMES), name


def test_adamw_multiplier_times_the_roles_own(tiny_model):
    config = MuonConfig(
        learning_rate=0.1, adamw_lr_multiplier=0.25, groups={"embedding": RoleOverride(lr_multiplier=0.5)}
    )
    optimizer = config.build(tiny_model())
    set_learning_rate(optimizer, 0.5)
    rates = {(g["algorithm"], g["role"]): g["lr"] for g in optimizer.param_groups}
    assert rates["adamw", "embedding"] == 0.1 * 0.5 * 0.125
    assert rates["adamw", "norm"] == 0.1 * 0.5 * 0.25
    assert rates["muon", "mlp"] == 0.1 * 0.5


def test_match_rms_gives_updates_the_rms_of_adamw():
    class One(nn.Module):
        role = "mlp"

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(64, 192))

    model = One()
    model.weight.grad = torch.randn(64, 192, generator=torch.Generator().manual_seed(0))
    MuonConfig(learning_rate=1.0, weight_decay=0.0).build(model).step()
    assert 0.15 < model.weight.square().mean().sqrt() < 0.25


def test_scales():
    assert update_scale("spectral", 32, 8) == 2.0
    assert update_scale("spectral", 8, 32) == 1.0
    assert update_scale("match_rms_adamw", 25, 100) == update_scale("match_rms_adamw", 100, 25) == 2.0


def test_batching_does_not_change_the_update(tiny_model, monkeypatch: pytest.MonkeyPatch):
    config = MuonConfig(learning_rate=0.02, ns_dtype="float32")
    batched, single, chunked = tiny_model(), tiny_model(), tiny_model()
    run(batched, config.build(batched), range(2))
    monkeypatch.setattr(muon_module, "BATCH_BYTES", 2 * 96 * 4)
    run(chunked, config.build(chunked), range(2))
    monkeypatch.setattr(muon_module, "BATCHED_NUMEL", 0)
    run(single, config.build(single), range(2))
    for name, value in batched.values().items():
        torch.testing.assert_close(value, single.values()[name], rtol=0, atol=1e-6)
        torch.testing.assert_close(value, chunked.values()[name], rtol=0, atol=1e-6)


def test_batches_hold_equal_small_shapes_and_cover_all(monkeypatch: pytest.MonkeyPatch):
    shapes = [(4, 6), (6, 4), (4, 6), (2, 4, 6), (4, 6), (40, 60)]
    parameters = [torch.zeros(s) for s in shapes]
    monkeypatch.setattr(muon_module, "BATCHED_NUMEL", 100)
    assert sorted(batches(parameters)) == [[0, 2, 4], [1], [3], [5]]
    monkeypatch.setattr(muon_module, "BATCH_BYTES", 2 * 24 * 4)
    assert sorted(batches(parameters)) == [[0, 2], [1], [3], [4], [5]]


@pytest.mark.parametrize("fused", [True, False])
def test_state_round_trip_is_exact(tiny_model, monkeypatch: pytest.MonkeyPatch, fused: bool):
    monkeypatch.setattr(muon_module, "fused_supported", lambda _: fused)
    config = MuonConfig(learning_rate=0.02)
    straight, first, second = tiny_model(), tiny_model(), tiny_model()
    run(straight, config.build(straight), range(4))
    before, after = config.build(first), config.build(second)
    assert {g["fused"] for g in before.param_groups if g["algorithm"] == "adamw"} == {fused}
    run(first, before, range(2))
    second.load_state_dict(first.state_dict())
    after.load_state_dict(before.state_dict())
    run(second, after, range(2, 4))
    assert all(torch.equal(v, second.values()[name]) for name, v in straight.values().items())
    dtypes = {t.dtype for s in after.state.values() for t in s.values()}
    assert dtypes == {torch.float32}


def test_parameters_without_gradient_stay(tiny_model):
    model = tiny_model()
    optimizer, start = MuonConfig(learning_rate=0.1).build(model), model.values()
    model.fill_gradients(0)
    model.mlp.up.grad = model.norm.weight.grad = None
    optimizer.step()
    unchanged = {name for name, value in model.values().items() if torch.equal(value, start[name])}
    assert unchanged == {"mlp.up", "norm.weight"}


def test_closure_is_called_with_gradients(tiny_model):
    model = tiny_model()
    optimizer = MuonConfig(learning_rate=0.1).build(model)

    def closure() -> float:
        loss = model.mlp.up.square().sum()
        loss.backward()
        return loss.item()

    before = model.values()["mlp.up"]
    assert optimizer.step(closure) == pytest.approx(before.square().sum().item())
    assert not torch.equal(model.mlp.up, before)


def test_a_model_without_matrices_is_an_error():
    class Norm(nn.Module):
        role = "norm"

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))

    with pytest.raises(ConfigError, match=r"no trainable hidden matrix.*adamw"):
        MuonConfig(learning_rate=0.1).build(Norm())


@pytest.mark.parametrize("override", [RoleOverride(betas=(0.9, 0.99)), RoleOverride(eps=1e-6)])
def test_adam_settings_of_a_muon_role_are_an_error(tiny_model, override: RoleOverride):
    MuonConfig(learning_rate=0.1, groups={"mlp": override}).build(tiny_model())  # mlp.row is AdamW's
    with pytest.raises(ConfigError, match=r"optimizer\.groups\.expert\.\w+: .* updated by Muon"):
        MuonConfig(learning_rate=0.1, groups={"expert": override}).build(tiny_model())
