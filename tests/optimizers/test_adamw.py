"""AdamW against its formula, and its state."""

import pytest
import torch

from graft.optimizers.adamw import build_adamw, fused_supported
from graft.optimizers.adamw_config import AdamWConfig
from graft.optimizers.groups import set_learning_rate
from graft.optimizers.groups_config import RoleOverride

CONFIG = AdamWConfig(
    learning_rate=0.03,
    weight_decay=0.2,
    betas=(0.8, 0.9),
    eps=1e-3,
    groups={"attention": RoleOverride(lr_multiplier=0.5, betas=(0.7, 0.85), eps=1e-2)},
)


def reference(values, gradients, rates, decay, betas, eps):
    """The update rule in fp64, one tensor."""
    theta, m, v = values.double(), 0.0, 0.0
    for t, (g, rate) in enumerate(zip(gradients, rates, strict=True), start=1):
        g = g.double()
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g * g
        theta = theta - rate * decay * theta
        theta = theta - rate * (m / (1 - betas[0] ** t)) / ((v / (1 - betas[1] ** t)).sqrt() + eps)
    return theta


def test_equals_the_formula(tiny_model):
    model = tiny_model()
    optimizer = CONFIG.build(model)
    start, gradients = model.values(), {name: [] for name, _ in model.named_parameters()}
    factors = [1.0, 0.5, 0.25]
    for step, factor in enumerate(factors):
        model.fill_gradients(step)
        for name, p in model.named_parameters():
            gradients[name].append(p.grad.clone())
        set_learning_rate(optimizer, factor)
        optimizer.step()
    group_of = {id(p): g for g in optimizer.param_groups for p in g["params"]}
    for name, p in model.named_parameters():
        role = group_of[id(p)]["role"]
        special = role == "attention"
        rates = [0.03 * f * (0.5 if special else 1.0) for f in factors]
        decay = 0.0 if role in {"norm", "bias", "scalar", "memory_bank"} else 0.2
        betas, eps = ((0.7, 0.85), 1e-2) if special else ((0.8, 0.9), 1e-3)
        expected = reference(start[name], gradients[name], rates, decay, betas, eps)
        torch.testing.assert_close(p.double(), expected, rtol=0, atol=1e-6)


def test_decay_is_decoupled(tiny_model):
    """With no gradient at all, one step shrinks a decayed tensor by exactly 1 - lr·wd and leaves the others."""
    model = tiny_model()
    optimizer = AdamWConfig(learning_rate=0.1, weight_decay=0.5).build(model)
    start = model.values()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    torch.testing.assert_close(model.mlp.up, start["mlp.up"] * 0.95)
    assert torch.equal(model.norm.weight, start["norm.weight"])


def test_fused_wherever_the_kernel_exists(tiny_model):
    assert fused_supported(tiny_model().parameters())
    assert all(g["fused"] for g in build_adamw(CONFIG, tiny_model()).param_groups)
    assert not fused_supported([torch.empty(1, device="meta")])
    assert not fused_supported([torch.empty(1), torch.empty(1, device="meta")])


@pytest.mark.parametrize("fused", [True, False])
def test_state_round_trip_is_exact(tiny_model, monkeypatch: pytest.MonkeyPatch, fused: bool):
    monkeypatch.setattr("graft.optimizers.adamw.fused_supported", lambda _: fused)
    straight, first, second = tiny_model(), tiny_model(), tiny_model()
    whole, before, after = (CONFIG.build(m) for m in (straight, first, second))
    assert all(g["fused"] is fused for g in whole.param_groups)
    for step in range(4):
        straight.fill_gradients(step)
        whole.step()
    for step in range(2):
        first.fill_gradients(step)
        before.step()
    second.load_state_dict(first.state_dict())
    after.load_state_dict(before.state_dict())
    for step in range(2, 4):
        second.fill_gradients(step)
        after.step()
    assert all(torch.equal(v, second.values()[name]) for name, v in straight.values().items())
