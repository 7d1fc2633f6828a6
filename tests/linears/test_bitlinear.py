"""BitLinear: the formula against an oracle, its gradients, how quantisation comes in, and who sees whom."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from graft.initialization import initialize
from graft.linears.bitlinear import BitLinear, TernaryOperands
from graft.linears.bitlinear_config import BitLinearConfig
from graft.linears.dense_config import DenseConfig
from graft.ops.ternary import fake_int8_rows, fake_ternary
from graft.part import parameter_roles
from graft.training.guard import Verdict
from graft.training.step import train_step
from graft.training.totals import Totals
from tiny_run import ListedLoader, assert_same_state, assert_same_weights, bare_run, random_batch, tiny


def bitlinear(*, dtype: torch.dtype = torch.float32, bias: bool = True, **fields: Any) -> BitLinear:
    config = BitLinearConfig.model_validate({"type": "bitlinear", **fields})
    module = config.build(24, 16, bias=bias, role="mlp", init_std=0.3)
    initialize(module, 0)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name != "weight":
                parameter.add_(torch.linspace(-0.5, 0.5, len(parameter)))
    return module.to(dtype)


def outcome(module: torch.nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Values, and gradients of x and of every parameter."""
    x = x.detach().requires_grad_()
    y = module(x)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)).sum().backward()
    assert x.grad is not None
    return [y.detach(), x.grad, *(p.grad for _, p in sorted(module.named_parameters()) if p.grad is not None)]


@pytest.mark.usefixtures("compiling")
@pytest.mark.parametrize("norm", [None, {"type": "rms_norm", "eps": 1e-6}])
@pytest.mark.parametrize("bias", [False, True])
def test_equals_transformers(norm: dict[str, Any] | None, bias: bool) -> None:
    from transformers.integrations.bitnet import AutoBitLinear

    ours = bitlinear(bias=bias, norm=norm)
    theirs = AutoBitLinear(24, 16, bias=bias, online_quant=True, use_rms_norm=norm is not None, rms_norm_eps=1e-6)
    weights = {name.replace("operands.norm.", "rms_norm."): t for name, t in ours.state_dict().items()}
    theirs.load_state_dict(weights)
    x = torch.randn(2, 5, 24)
    with torch.compiler.set_stance("force_eager"):
        expected = outcome(theirs, x)
    actual = outcome(ours, x)
    assert len(actual) == len(expected) == 3 + bias + (norm is not None)
    names = [sorted(n.replace("operands.norm", "rms_norm") for n, _ in m.named_parameters()) for m in (ours, theirs)]
    assert names[0] == names[1]
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.1)])
def test_gradients_are_those_of_the_quantised_dense_map(dtype: torch.dtype, tolerance: float) -> None:
    module, x = bitlinear(norm=None, dtype=dtype), torch.randn(3, 24).to(dtype)
    y, d_x, d_bias, d_weight = outcome(module, x)
    g = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape)
    x_hat, w_hat = fake_int8_rows(x).double(), fake_ternary(module.weight).detach().double()
    expected = [x_hat @ w_hat.T + module.bias.double(), g @ w_hat, g.sum(0), g.T @ x_hat]
    for actual, wanted in zip([y, d_x, d_bias, d_weight], expected, strict=True):
        torch.testing.assert_close(actual.double(), wanted.detach(), rtol=tolerance, atol=tolerance)


def test_before_quantisation_comes_in_it_is_the_dense_map_bit_for_bit() -> None:
    x = torch.randn(2, 5, 24)
    dense = DenseConfig().build(24, 16, bias=True, role="mlp", init_std=0.3)
    plain = bitlinear(norm=None, warmup_steps=10)
    dense.load_state_dict({name: t for name, t in plain.state_dict().items() if name != "operands.updates"})
    for actual, expected in zip(outcome(plain, x), outcome(dense, x), strict=True):
        assert torch.equal(actual, expected)
    normed = bitlinear(warmup_steps=10)
    assert normed.operands.norm is not None
    assert torch.equal(normed(x), dense(normed.operands.norm(x)))


def test_quantisation_comes_in_with_the_updates() -> None:
    module, x = bitlinear(norm=None, warmup_steps=4), torch.randn(3, 24)
    for updates in range(6):
        share = torch.tensor(min(1.0, updates / 4))
        expected = torch.nn.functional.linear(fake_int8_rows(x, share), fake_ternary(module.weight, share), module.bias)
        assert torch.equal(module(x), expected)
        assert module.operands.fully_quantised() == (updates >= 4)
        module.operands.count_update()
    assert torch.equal(module(x), bitlinear(norm=None)(x))
    assert bitlinear().operands.fully_quantised()


def test_starts_with_the_numbers_of_a_dense_map() -> None:
    dense = DenseConfig().build(24, 16, bias=False, role="mlp", init_std=0.3)
    initialize(dense, 0)
    assert torch.equal(bitlinear(bias=False).weight, dense.weight)


def test_no_row_reads_another() -> None:
    """The norm and the largest value are of the last axis alone (over positions too, the future would leak)."""
    module, x = bitlinear(), torch.randn(2, 5, 24)
    changed = x.clone()
    changed[1, 3] *= -100
    same = (module(x) == module(changed)).all(-1)
    assert same.tolist() == [[True] * 5, [True, True, True, False, True]]


def test_roles() -> None:
    assert parameter_roles(bitlinear()) == {"weight": "mlp", "bias": "bias", "operands.norm.weight": "norm"}


def updates_of(run: Any) -> set[int]:
    return {int(m.updates) for m in run.model.modules() if isinstance(m, TernaryOperands)}


def test_updates_are_counted_when_they_are_made_and_kept(tmp_path: Any) -> None:
    experiment = tiny(tmp_path, "model.linear={type: bitlinear, warmup_steps: 5}")
    steps = [[random_batch(2, 8, seed=i)] for i in range(4)]
    straight = bare_run(experiment, steps)
    torch.manual_seed(0)
    for _ in range(4):
        train_step(straight)
    run = bare_run(experiment, steps)
    torch.manual_seed(0)
    for _ in range(2):
        train_step(run)
    assert updates_of(run) == {2}
    run.finish_step(Verdict.NOT_FINITE, Totals())  # an update that was not made
    assert updates_of(run) == {2}
    run.step -= 1
    state = run.state_dict()
    resumed = bare_run(experiment, steps)
    assert isinstance(resumed.loader, ListedLoader)
    resumed.load_state_dict(state)
    for _ in range(2):
        train_step(resumed)
    assert updates_of(resumed) == {4}
    assert_same_weights(resumed, straight)
    assert_same_state(resumed, straight)
