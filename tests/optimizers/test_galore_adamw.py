"""GaLore against a plain fp64 form; what it keeps; who gets it."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from graft.errors import ConfigError
from graft.optimizers.adamw_config import AdamWConfig
from graft.optimizers.galore_adamw import keeps_rows
from graft.optimizers.galore_adamw_config import GaloreAdamWConfig

PROJECTED = {"attention.q", "attention.o", "mlp.up", "mlp.up2", "mlp.down"}
RATE, DECAY = 0.02, 0.3


def config(**fields) -> GaloreAdamWConfig:
    settings = {"rank": 3, "update_proj_gap": 2, "scale": 0.5, "weight_decay": DECAY, **fields}
    return GaloreAdamWConfig(learning_rate=RATE, **settings)


def run(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        model.fill_gradients(step)
        optimizer.step()


def gradients(model: nn.Module, steps: int) -> list[dict[str, Tensor]]:
    collected = []
    for step in range(steps):
        model.fill_gradients(step)
        collected.append({name: p.grad.clone() for name, p in model.named_parameters()})
    return collected


def reference(theta: Tensor, grads: list[Tensor], *, rank: int, gap: int, scale: float, rows: bool) -> Tensor:
    """The update written as sums over indices, moments as weighted means of all updates so far."""
    down, up = ("rk,rc->kc", "rk,kc->rc") if rows else ("ck,rc->rk", "ck,rk->rc")
    projected: list[Tensor] = []
    for t, g in enumerate(grads):
        if t % gap == 0:
            left, _, right = torch.linalg.svd(g, full_matrices=False)
            basis = left[:, :rank] if rows else right[:rank].T
        projected.append(torch.einsum(down, basis, g))
        mean, square = average(projected, 0.9), average([x**2 for x in projected], 0.95)
        moved = torch.einsum(up, basis, mean / (square.sqrt() + 1e-8))
        theta = theta - RATE * DECAY * theta - RATE * scale * moved
    return theta


def average(values: list[Tensor], decay: float) -> Tensor:
    """Weighted mean, the newest value weighing most."""
    weights = torch.tensor([decay**age for age in reversed(range(len(values)))], dtype=torch.float64)
    return torch.einsum("t,t...->...", weights / weights.sum(), torch.stack(values))


@pytest.mark.parametrize("proj_type", ["std", "reverse_std", "left", "right"])
def test_equals_the_plain_form(tiny_model, proj_type: str) -> None:
    model = tiny_model().double()
    optimizer, start = config(proj_type=proj_type).build(model), model.values()
    run(model, optimizer, range(5))
    collected = gradients(model, 5)
    for name in PROJECTED:
        rows = keeps_rows(proj_type, *start[name].shape)
        expected = reference(start[name], [g[name] for g in collected], rank=3, gap=2, scale=0.5, rows=rows)
        torch.testing.assert_close(model.values()[name], expected, rtol=0, atol=1e-10)


def test_the_side_that_is_kept() -> None:
    assert [keeps_rows("std", 4, 7), keeps_rows("std", 7, 4)] == [True, False]
    assert [keeps_rows("reverse_std", 4, 7), keeps_rows("reverse_std", 7, 4)] == [False, True]
    assert [keeps_rows("left", 4, 7), keeps_rows("right", 4, 7)] == [True, False]


def test_without_memory_the_update_is_the_sign_within_the_subspace(tiny_model) -> None:
    model = tiny_model().double()
    optimizer = config(betas=(0.0, 0.0), weight_decay=0.0, eps=1e-30).build(model)
    start = model.values()
    run(model, optimizer, range(1))
    name = "mlp.down"
    g = gradients(model, 1)[0][name]
    u, s, vt = torch.linalg.svd(g, full_matrices=False)
    expected = start[name] - RATE * 0.5 * u[:, :3] @ (torch.diag(s[:3]) @ vt[:3]).sign()
    torch.testing.assert_close(model.values()[name], expected)


def test_state_is_low_rank(tiny_model) -> None:
    model = tiny_model()
    optimizer = config().build(model)
    run(model, optimizer, range(1))
    for name, p in model.named_parameters():
        shapes = {key: tuple(value.shape) for key, value in optimizer.state[p].items() if isinstance(value, Tensor)}
        if name in PROJECTED:
            short, long = sorted(p.shape)
            low = (3, long) if p.shape[0] < p.shape[1] else (long, 3)
            assert shapes == {"projection": (short, 3), "exp_avg": low, "exp_avg_sq": low}
        else:
            assert shapes["exp_avg"] == tuple(p.shape)


def test_directions_are_chosen_every_gap_updates(tiny_model) -> None:
    model = tiny_model()
    optimizer = config(update_proj_gap=3).build(model)
    seen = []
    for step in range(7):
        run(model, optimizer, range(step, step + 1))
        seen.append(optimizer.state[model.mlp.up]["projection"].clone())
    changed = [not torch.equal(a, b) for a, b in pairwise(seen)]
    assert changed == [False, False, True, False, False, True]


def test_everything_else_is_adamw(tiny_model) -> None:
    ours, plain = tiny_model(), tiny_model()
    run(ours, config().build(ours), range(3))
    run(plain, AdamWConfig(learning_rate=RATE, weight_decay=DECAY).build(plain), range(3))
    same = {name for name, value in ours.values().items() if torch.equal(value, plain.values()[name])}
    assert same == set(ours.values()) - PROJECTED


def test_larger_sides_are_left_alone(tiny_model) -> None:
    optimizer = config(max_dim=8).build(tiny_model())
    taken = [p for group in optimizer.param_groups if group["algorithm"] == "galore" for p in group["params"]]
    assert sorted(tuple(p.shape) for p in taken) == [(6, 8), (8, 6)]


def test_a_rank_above_every_matrix_is_an_error(tiny_model) -> None:
    with pytest.raises(ConfigError, match="no trainable hidden matrix has both sides above rank 6"):
        config(rank=6).build(tiny_model())


def test_state_comes_back_in_the_middle_of_a_gap(tiny_model) -> None:
    whole, first, second = tiny_model(), tiny_model(), tiny_model()
    run(whole, config(update_proj_gap=3).build(whole), range(5))
    optimizer = config(update_proj_gap=3).build(first)
    run(first, optimizer, range(2))
    second.load_state_dict(first.state_dict())
    again = config(update_proj_gap=3).build(second)
    again.load_state_dict(optimizer.state_dict())
    run(second, again, range(2, 5))
    assert all(torch.equal(value, second.values()[name]) for name, value in whole.values().items())
