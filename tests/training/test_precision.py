"""Autocast, the loss scale, and what a step that overflows does and does not change."""

import copy
import math

import pytest
import torch
from torch import nn

import graft.training.precision as precision_module
from graft.errors import ConfigError
from graft.training.precision import INITIAL_SCALE, Precision, autocast_works

CPU = torch.device("cpu")


def model_and_optimizer(fused: bool = True) -> tuple[nn.Linear, torch.optim.Optimizer]:
    model = nn.Linear(4, 4)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.linspace(-1, 1, p.numel()).view(p.shape))
    return model, torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused)


def one_step(precision: Precision, model: nn.Module, optimizer: torch.optim.Optimizer, factor: float = 1.0) -> bool:
    """A training step as the run makes it; returns whether the gradients were finite."""
    with precision.autocast():
        y = model(torch.ones(2, 4))
    loss = 1e-2 * factor * y.float().square().mean()  # small enough for the first loss scale
    precision.scale(loss).backward()
    precision.unscale(optimizer)
    norm = nn.utils.get_total_norm([p.grad for p in model.parameters()])
    finite = bool(norm.isfinite())
    if finite:
        precision.step(optimizer)
    precision.update(overflowed=not finite)
    optimizer.zero_grad()
    return finite


@pytest.mark.parametrize(
    ("name", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_matrix_products_have_the_dtype_and_master_weights_are_fp32(name, dtype: torch.dtype):
    precision = Precision(name, CPU)
    model, optimizer = model_and_optimizer()
    with precision.autocast():
        assert model(torch.ones(2, 4)).dtype == dtype == precision.dtype
    before = model.weight.detach().clone()
    assert one_step(precision, model, optimizer)
    assert model.weight.dtype == torch.float32
    assert not torch.equal(model.weight, before)
    assert {t.dtype for s in optimizer.state.values() for t in s.values()} == {torch.float32}
    assert (precision.loss_scale is None) == (name != "fp16")


def test_fp32_is_the_plain_computation_bit_for_bit():
    (plain, plain_optimizer), (model, optimizer) = model_and_optimizer(), model_and_optimizer()
    (1e-2 * plain(torch.ones(2, 4)).square().mean()).backward()
    plain_optimizer.step()
    one_step(Precision("fp32", CPU), model, optimizer)
    assert torch.equal(plain.weight, model.weight)


def test_fp16_gradients_are_unscaled_before_they_are_seen():
    precision = Precision("fp16", CPU)
    model, optimizer = model_and_optimizer()
    plain = copy.deepcopy(model)
    (1e-2 * plain(torch.ones(2, 4)).square().mean()).backward()
    with precision.autocast():
        y = model(torch.ones(2, 4))
    precision.scale(1e-2 * y.float().square().mean()).backward()
    assert plain.weight.grad is not None
    torch.testing.assert_close(model.weight.grad, plain.weight.grad * INITIAL_SCALE, rtol=2e-3, atol=0)
    precision.unscale(optimizer)
    torch.testing.assert_close(model.weight.grad, plain.weight.grad, rtol=2e-3, atol=0)


def test_fp16_keeps_gradients_that_would_be_zero_without_the_scale():
    x = torch.full((2, 4), 1e-3)
    gradients = {}
    for scaled in (True, False):
        precision, (model, _) = Precision("fp16", CPU), model_and_optimizer()
        with precision.autocast():
            y = model(x)
        loss = y.float().sum() * 1e-8
        (precision.scale(loss) if scaled else loss).backward()
        assert model.bias.grad is not None
        gradients[scaled] = bool(model.bias.grad.any())
    assert gradients == {True: True, False: False}


@pytest.mark.parametrize("fused", [True, False])
def test_an_overflow_changes_nothing_but_the_scale(fused: bool):
    precision = Precision("fp16", CPU)
    model, optimizer = model_and_optimizer(fused)
    assert one_step(precision, model, optimizer)
    weights = copy.deepcopy(model.state_dict())
    state = copy.deepcopy(optimizer.state_dict())
    assert not one_step(precision, model, optimizer, factor=1e3)  # the gradient of y exceeds 65504 once scaled
    assert precision.loss_scale == INITIAL_SCALE / 2
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    for i, entry in optimizer.state_dict()["state"].items():
        assert all(torch.equal(v, state["state"][i][k]) for k, v in entry.items())
    assert one_step(precision, model, optimizer)
    assert precision.loss_scale == INITIAL_SCALE / 2


def test_the_callers_verdict_decides_even_if_these_gradients_are_finite():
    """Another rank overflowed: the scale falls here too, so that all ranks keep one scale."""
    precision = Precision("fp16", CPU)
    model, optimizer = model_and_optimizer()
    one_step(precision, model, optimizer)
    with precision.autocast():
        y = model(torch.ones(2, 4))
    precision.scale(1e-2 * y.float().square().mean()).backward()
    precision.unscale(optimizer)
    precision.update(overflowed=True)
    assert precision.state_dict() == {"loss_scale": INITIAL_SCALE / 2, "good_steps": 0}


def test_the_scale_never_falls_below_one():
    precision = Precision("fp16", CPU)
    model, optimizer = model_and_optimizer()
    for _ in range(20):
        assert not one_step(precision, model, optimizer, factor=math.inf)
    assert precision.loss_scale == 1.0


def test_the_scale_grows_after_enough_good_steps(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(precision_module, "GROWTH_INTERVAL", 3)
    precision = Precision("fp16", CPU)
    model, optimizer = model_and_optimizer()
    precision.load_state_dict({"loss_scale": 8.0, "good_steps": 0})
    scales = []
    for step in range(7):
        one_step(precision, model, optimizer, factor=math.inf if step == 1 else 1.0)
        scales.append(precision.loss_scale)
    assert scales == [8, 4, 4, 4, 8, 8, 8]  # the overflow at step 1 halves and starts the count again


@pytest.mark.parametrize("after", ["before the first step", "later"])
def test_state_round_trip(after: str):
    precision, other = Precision("fp16", CPU), Precision("fp16", CPU)
    model, optimizer = model_and_optimizer()
    one_step(precision, model, optimizer, factor=math.inf)
    one_step(precision, model, optimizer)
    if after == "later":
        one_step(other, model, optimizer)
    other.load_state_dict(precision.state_dict())
    assert precision.state_dict() == other.state_dict() == {"loss_scale": INITIAL_SCALE / 2, "good_steps": 1}
    one_step(other, model, optimizer)
    assert other.state_dict() == {"loss_scale": INITIAL_SCALE / 2, "good_steps": 2}


def test_changing_the_precision_keeps_the_new_start():
    fp16, bf16 = Precision("fp16", CPU), Precision("bf16", CPU)
    assert bf16.state_dict() == {}
    bf16.load_state_dict(fp16.state_dict())
    fp16.load_state_dict(bf16.state_dict())
    assert fp16.loss_scale == INITIAL_SCALE


def test_a_device_that_cannot_is_a_config_error(monkeypatch: pytest.MonkeyPatch):
    assert not autocast_works(CPU, torch.int8)  # torch warns and turns autocast off
    monkeypatch.setattr(precision_module, "autocast_works", lambda device, dtype: False)
    with pytest.raises(ConfigError, match="precision: the device 'cpu' cannot compute in fp16"):
        Precision("fp16", CPU)
    Precision("fp32", CPU)
