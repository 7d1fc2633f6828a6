"""The probe of fp32 matrix products: what it measures, what it accepts, what it leaves behind."""

import math

import pytest
import torch

import graft.training.matmul as matmul_module
from graft.training.matmul import (
    MAX_PROBE_ERROR,
    MIN_PROBE_SPEEDUP,
    PROBE_SHAPE,
    MatmulProbe,
    probe_fp32_matmul,
    relative_error,
    use_onednn_fp32,
)

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs oneDNN")
SMALL = (64, 32, 128)


@pytest.fixture(autouse=True)
def _route_restored():
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


def test_the_switch_reaches_onednn():
    use_onednn_fp32(True)
    assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
    use_onednn_fp32(False)
    assert torch.backends.mkldnn.matmul.fp32_precision != "bf16"


@pytest.mark.parametrize("inner", [32, 512, 4096])
def test_the_error_tells_fp32_from_bf16(inner: int):
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(80, inner, generator=generator), torch.randn(inner, 96, generator=generator)
    assert relative_error(left @ right, left, right) < MAX_PROBE_ERROR / 2
    rounded = left.bfloat16().float() @ right.bfloat16().float()
    assert relative_error(rounded, left, right) > 500 * MAX_PROBE_ERROR
    wrong = left @ right
    wrong[3, 5] += 1.0
    assert relative_error(wrong, left, right) == pytest.approx(1.0 / (left @ right)[:64].abs().max().item(), rel=1e-3)


def test_the_error_is_onednns_and_both_routes_are_timed(monkeypatch: pytest.MonkeyPatch):
    routes: dict[str, list[str]] = {"error": [], "time": []}

    def error(product, left, right):
        routes["error"].append(torch.get_float32_matmul_precision())
        return len(routes["error"]) * 1e-7

    def seconds(left, right):
        routes["time"].append(torch.get_float32_matmul_precision())
        warming_up = len(routes["time"]) <= 6
        return 0.5 if warming_up else {"highest": 4.0, "medium": 1.0}[routes["time"][-1]] + len(routes["time"])

    monkeypatch.setattr(matmul_module, "relative_error", error)
    monkeypatch.setattr(matmul_module, "product_seconds", seconds)
    torch.set_float32_matmul_precision("high")
    probe = probe_fp32_matmul(SMALL, rounds=2)
    assert torch.get_float32_matmul_precision() == "high"
    assert routes["error"] == ["medium"] * 3
    assert routes["time"] == (["highest"] * 3 + ["medium"] * 3) * 3
    # the best of two timed rounds is the first, whose calls are numbers 7 to 12
    assert probe == MatmulProbe(SMALL, 3 * 4.0 + 7 + 8 + 9, 3 * 1.0 + 10 + 11 + 12, pytest.approx(3e-7))


def test_accepts_only_what_is_faster_and_still_fp32():
    slow, fast = 1.0, 1.0 / (MIN_PROBE_SPEEDUP + 0.01)
    assert MatmulProbe(SMALL, slow, fast, 1e-6).accepts_onednn
    assert not MatmulProbe(SMALL, slow, 1.0 / (MIN_PROBE_SPEEDUP - 0.01), 1e-6).accepts_onednn
    assert not MatmulProbe(SMALL, slow, fast, MAX_PROBE_ERROR).accepts_onednn
    assert not MatmulProbe(SMALL, slow, fast, math.nan).accepts_onednn


@pytest.mark.parametrize("shape", [(10**6, 512, 2048), (8, 64, 64), (4, 10**5, 10**5)])
def test_large_shapes_are_cut_down_to_a_short_measurement(monkeypatch: pytest.MonkeyPatch, shape):
    monkeypatch.setattr(matmul_module, "product_seconds", lambda left, right: 1.0)
    monkeypatch.setattr(matmul_module, "relative_error", lambda product, left, right: 0.0)
    M, K, N = probe_fp32_matmul(shape).shape
    assert 2 * math.prod(PROBE_SHAPE) >= M * K * N
    assert (min(shape[1], 4096), min(shape[2], 4096)) == (K, N)
