"""Row-wise updates: equal to the plain rule on the rows that were used, bit for bit nothing on all others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graft.errors import ConfigError
from graft.ops.row_gradients import rows_only, wants_rows
from graft.optimizers import rowwise
from graft.optimizers.adamw_config import AdamWConfig
from graft.optimizers.groups import describe_groups, set_learning_rate
from graft.optimizers.groups_config import RoleOverride
from graft.optimizers.muon_config import MuonConfig

ROWS, WIDTH = 9, 4
USED = ([0, 3, 4], [3], [], [0, 8, 3, 5])
BOTH = pytest.mark.parametrize("update", ["rowwise_adagrad", "rowwise_adam"])


class Tables(nn.Module):
    """Two tables that are read row by row, and a matrix that is not."""

    role = "expert_table"
    param_roles = {"plain": "mlp"}  # noqa: RUF012 - as modules declare them
    row_tables = ("down", "up")

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.down, self.up = (nn.Parameter(torch.randn(ROWS, WIDTH, generator=generator)) for _ in range(2))
        self.plain = nn.Parameter(torch.randn(4, 5, generator=generator))


def config(update: Any, **override: Any) -> AdamWConfig:
    fields = {"betas": (0.7, 0.8), "eps": 1e-3} if update == "rowwise_adam" else {"eps": 1e-3}
    groups: Any = {"expert_table": RoleOverride(update=update, **{**fields, **override})}
    return AdamWConfig(learning_rate=0.1, weight_decay=0.2, groups=groups)


def gradient(step: int, salt: int, rows: list[int]) -> Tensor:
    generator = torch.Generator().manual_seed(100 * step + salt)
    return torch.randn(len(rows), WIDTH, generator=generator)


def fill(model: Tables, step: int) -> None:
    """Row gradients of the rows that the step uses, in any order: sums in two pieces, as micro-batches leave them."""
    for salt, table in enumerate((model.down, model.up)):
        rows = torch.tensor(USED[step], dtype=torch.int64)
        values = gradient(step, salt, USED[step])
        orders = torch.arange(len(rows)), torch.arange(len(rows)).flip(0)
        pieces = [
            torch.sparse_coo_tensor(rows[order][None], share * values[order], (ROWS, WIDTH), check_invariants=True)
            for share, order in zip((0.25, 0.75), orders, strict=True)
        ]
        table.grad = pieces[0] + pieces[1]
    model.plain.grad = torch.ones(4, 5)


def adagrad(theta: Tensor, gradients: list[Tensor], rate: float, decay: float) -> Tensor:
    """One row by the formula, in double precision."""
    theta, total = theta.double(), 0.0
    for g in (g.double() for g in gradients):
        total += float((g * g).sum()) / len(g)
        theta = theta - rate * decay * theta - rate * g / (total**0.5 + 1e-3)
    return theta


def adam(theta: Tensor, gradients: list[Tensor], rate: float, decay: float) -> Tensor:
    """One row by PyTorch's AdamW, which is told only of the steps that used it."""
    row = nn.Parameter(theta.double())
    oracle = torch.optim.AdamW([row], lr=rate, betas=(0.7, 0.8), eps=1e-3, weight_decay=decay)
    for g in gradients:
        row.grad = g.double()
        oracle.step()
    return row.detach()


@BOTH
@pytest.mark.parametrize("decay", [0.0, 0.5])
@pytest.mark.parametrize("piece", [2**20, 1])
def test_equals_the_plain_rule_restricted_to_used_rows(
    update: str, decay: float, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rowwise, "PIECE_BYTES", piece)
    model = Tables()
    optimizer = config(update, weight_decay=decay, lr_multiplier=0.5).build(model)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    for step in range(4):
        fill(model, step)
        set_learning_rate(optimizer, 1.0)
        optimizer.step()
    rule = adagrad if update == "rowwise_adagrad" else adam
    for salt, (name, table) in enumerate((("down", model.down), ("up", model.up))):
        for row in range(ROWS):
            steps = [s for s in range(4) if row in USED[s]]
            gradients = [gradient(s, salt, USED[s])[USED[s].index(row)] for s in steps]
            expected = rule(start[name][row], gradients, 0.05, decay)
            torch.testing.assert_close(table[row].double(), expected, rtol=0, atol=2e-6)
            assert torch.equal(table[row], start[name][row]) == (not steps)


@BOTH
def test_unused_rows_and_their_state_stay_bit_for_bit(update: str) -> None:
    model = Tables()
    optimizer = config(update).build(model)
    fill(model, 0)
    optimizer.step()
    before = [
        {k: v.clone() for k, v in optimizer.state[t].items()} | {"row": t.clone()} for t in (model.down, model.up)
    ]
    fill(model, 3)
    optimizer.step()
    used = torch.tensor(USED[3])
    others = [row for row in range(ROWS) if row not in USED[3]]
    for table, kept in zip((model.down, model.up), before, strict=True):
        for key, old in kept.items():
            new = table if key == "row" else optimizer.state[table][key]
            assert torch.equal(new[others], old[others])
            changed = (new[used] != old[used]).flatten(1) if new.ndim == 2 else (new[used] != old[used])[:, None]
            assert changed.any(1).all()


def test_state_of_adagrad_is_one_number_per_row() -> None:
    model = Tables()
    optimizer = config("rowwise_adagrad").build(model)
    fill(model, 0)
    optimizer.step()
    (state,) = optimizer.state[model.down].values()
    assert (state.shape, state.dtype) == ((ROWS,), torch.float32)


@BOTH
def test_state_round_trip_is_exact(update: str) -> None:
    straight, first, second = Tables(), Tables(), Tables()
    whole, before, after = (config(update).build(m) for m in (straight, first, second))
    for step in range(4):
        fill(straight, step)
        whole.step()
    for step in range(2):
        fill(first, step)
        before.step()
    second.load_state_dict(first.state_dict())
    after.load_state_dict(before.state_dict())
    for step in range(2, 4):
        fill(second, step)
        after.step()
    assert all(torch.equal(p, q) for p, q in zip(straight.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize("kind", [AdamWConfig, MuonConfig])
def test_only_the_role_that_asks_is_marked(kind: type[AdamWConfig] | type[MuonConfig]) -> None:
    model = Tables()
    groups: Any = {"expert_table": RoleOverride(update="rowwise_adam", betas=(0.5, 0.6), lr_multiplier=3.0)}
    optimizer = kind(learning_rate=0.1, groups=groups).build(model)
    assert [wants_rows(p) for p in (model.down, model.up, model.plain)] == [True, True, False]
    row = next(row for row in describe_groups(optimizer) if row.role == "expert_table")
    assert (row.algorithm, row.num_tensors, row.lr_multiplier, row.weight_decay) == ("rowwise_adam", 2, 3.0, 0.0)
    (group,) = (g for g in optimizer.param_groups if g["role"] == "expert_table")
    assert (group["betas"], group["eps"]) == ((0.5, 0.6), 1e-8)
    kind(learning_rate=0.1).build(model)
    assert not any(wants_rows(p) for p in model.parameters())


def test_the_rest_is_updated_as_before() -> None:
    with_tables = Tables()
    alone: Any = nn.Module()
    alone.role, alone.plain = "mlp", nn.Parameter(with_tables.plain.detach().clone())
    optimizers = (
        config("rowwise_adagrad").build(with_tables),
        AdamWConfig(learning_rate=0.1, weight_decay=0.2).build(alone),
    )
    fill(with_tables, 0)
    alone.plain.grad = torch.ones(4, 5)
    for optimizer in optimizers:
        optimizer.step()
    assert torch.equal(with_tables.plain, alone.plain)


def test_only_tables_can_be_updated_by_row() -> None:
    groups: Any = {"mlp": RoleOverride(update="rowwise_adagrad")}
    with pytest.raises(ConfigError, match=r"optimizer\.groups\.mlp\.update: plain is not a table that is read row"):
        AdamWConfig(learning_rate=0.1, groups=groups).build(Tables())


def test_adagrad_has_no_betas() -> None:
    with pytest.raises(ValueError, match="betas do nothing here"):
        RoleOverride(update="rowwise_adagrad", betas=(0.9, 0.95))


def test_a_dense_gradient_is_a_bug() -> None:
    model = Tables()
    optimizer = config("rowwise_adagrad").build(model)
    model.down.grad = torch.ones(ROWS, WIDTH)
    with pytest.raises(AssertionError, match="marked after"):
        optimizer.step()
    model.down.grad = rows_only(torch.tensor([1]), torch.ones(1, WIDTH), ROWS)
    optimizer.step()
