"""Experts as rows of tables: both forms, their gradients, and what they hold in memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from graft.cost.live_bytes import LiveBytes
from graft.ops import expert_rows as module
from graft.ops.activations import ACTIVATIONS
from graft.ops.expert_rows import dot_rows, expert_rows
from graft.ops.row_gradients import coalesce_rows, mark_rows, split_rows

R, D, E, K = 7, 6, 20, 5


def made(units: int, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    return {
        "x_RD": torch.randn(R, D, dtype=dtype).requires_grad_(),
        "down_EW": torch.randn(E, units * D, dtype=dtype).requires_grad_(),
        "up_EW": torch.randn(E, units * D, dtype=dtype).requires_grad_(),
        "ids_RK": torch.randint(E // 2, (R, K)),  # repetitions, and rows that nobody reads
        "gates_RK": torch.rand(R, K, dtype=dtype).requires_grad_(),
    }


def gradients(given: dict[str, torch.Tensor], **how: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    leaves = {name: t for name, t in given.items() if t.requires_grad}
    for leaf in leaves.values():
        leaf.grad = None
    y = expert_rows(**given, **how)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    return y.detach(), {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def by_hand(given: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """The formula in loops."""
    y = torch.zeros(R, D, dtype=torch.float64)
    for r in range(R):
        for k in range(K):
            expert = int(given["ids_RK"][r, k])
            for down, up in zip(given["down_EW"][expert].split(D), given["up_EW"][expert].split(D), strict=True):
                y[r] += given["gates_RK"][r, k] * ACTIVATIONS[name](down @ given["x_RD"][r]) * up
    return y


@pytest.mark.parametrize("units", [1, 3])
@pytest.mark.parametrize("name", ["gelu", "relu", "silu"])
@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_closed_form(units: int, name: str, kernels: Any) -> None:
    given = made(units)
    y = expert_rows(**given, activation=ACTIVATIONS[name], kernels=kernels)
    torch.testing.assert_close(y, by_hand(given, name), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rows", [False, True], ids=["dense", "rows"])
@pytest.mark.parametrize("units", [1, 3])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_fast_equals_reference(units: int, dtype: torch.dtype, tolerance: float, rows: bool) -> None:
    given = made(units, dtype)
    plain = gradients(given, activation=ACTIVATIONS["gelu"], kernels="reference")
    for table in ("down_EW", "up_EW"):
        mark_rows(given[table], rows)
    fast = gradients(given, activation=ACTIVATIONS["gelu"])
    torch.testing.assert_close(fast[0], plain[0], rtol=tolerance, atol=tolerance)
    for name, expected in plain[1].items():
        found = fast[1][name]
        assert found.is_sparse == (rows and name.endswith("EW"))
        torch.testing.assert_close(found.to_dense(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_row_gradients_hold_the_rows_that_were_read_and_no_other(kernels: Any) -> None:
    given = made(2)
    for table in ("down_EW", "up_EW"):
        mark_rows(given[table], True)
    _, found = gradients(given, activation=ACTIVATIONS["relu"], kernels=kernels)
    for table in ("down_EW", "up_EW"):
        rows, values = split_rows(coalesce_rows(found[table]))
        assert rows.tolist() == sorted(set(given["ids_RK"].flatten().tolist()))
        assert values.shape == (len(rows), 2 * D)


def test_gradcheck() -> None:
    given = made(2)
    ids, activation = given.pop("ids_RK"), ACTIVATIONS["silu"]

    def run(x: torch.Tensor, down: torch.Tensor, up: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        return expert_rows(x, down, up, ids, gates, activation)

    assert torch.autograd.gradcheck(run, tuple(given.values()))


def test_a_frozen_table_gets_no_gradient() -> None:
    given = made(1)
    given["up_EW"].requires_grad_(False)
    _, found = gradients(given, activation=ACTIVATIONS["gelu"])
    assert set(found) == {"x_RD", "down_EW", "gates_RK"}


def test_pieces_do_not_change_products(monkeypatch: pytest.MonkeyPatch) -> None:
    given = made(1)
    whole = dot_rows(given["down_EW"].detach(), given["x_RD"].detach(), given["ids_RK"])
    monkeypatch.setattr(module, "READ_BYTES_CPU", 2 * K * D * 8)
    torch.testing.assert_close(dot_rows(given["down_EW"].detach(), given["x_RD"].detach(), given["ids_RK"]), whole)


def test_the_rows_that_were_read_are_never_held(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, width, chosen = 64, 128, 64
    read = rows * chosen * width * 8  # bytes of one table's rows
    monkeypatch.setattr(module, "READ_BYTES_CPU", read // 64)
    x = torch.randn(rows, width, dtype=torch.float64, requires_grad=True)
    tables = [torch.randn(100, width, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    ids, gates = torch.randint(100, (rows, chosen)), torch.rand(rows, chosen, dtype=torch.float64)
    peaks = {}
    for kernels in ("auto", "reference"):
        with LiveBytes() as live:
            expert_rows(x, *tables, ids, gates, ACTIVATIONS["gelu"], kernels=kernels).sum().backward()
        peaks[kernels] = live.peak
    assert peaks["reference"] > 2 * read
    assert peaks["auto"] < read / 2
