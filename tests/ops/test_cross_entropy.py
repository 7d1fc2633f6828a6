"""The fused cross-entropy: equals its definition in values and gradients, in much less memory."""

from __future__ import annotations

import math
import weakref
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from graft.ops import cross_entropy
from graft.ops.cross_entropy import CrossEntropySums, linear_cross_entropy


def inputs(
    rows: int = 11, width: int = 6, table: int = 29, vocab: int = 27, *, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, W, b and targets, every fourth of them ignored."""
    x = torch.randn(rows, width, dtype=dtype, requires_grad=True)
    weight = torch.randn(table, width, dtype=dtype, requires_grad=True)
    bias = torch.randn(table, dtype=dtype, requires_grad=True)
    targets = torch.randint(vocab, (rows,))
    targets[::4] = -100
    return x, weight, bias, targets


def gradients(sums: CrossEntropySums, *tensors: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(sums.loss, tensors)


def test_definition_by_hand() -> None:
    x, weight, bias, targets = inputs()
    sums = linear_cross_entropy(
        x, weight, targets, bias_V=bias, vocab_size=27, softcap=2.0, z_loss_coef=0.25, kernels="reference"
    )
    ce = z = 0.0
    for row, target in zip(x.tolist(), targets.tolist(), strict=True):
        if target == -100:
            continue
        raw = [
            sum(a * b for a, b in zip(row, w, strict=True)) + c
            for w, c in zip(weight.tolist(), bias.tolist(), strict=True)
        ]
        logits = [2.0 * math.tanh(value / 2.0) for value in raw[:27]]
        lse = math.log(sum(math.exp(value) for value in logits))
        ce += lse - logits[target]
        z += lse**2
    assert sums.ce.item() == pytest.approx(ce, rel=1e-12)
    assert sums.z.item() == pytest.approx(z, rel=1e-12)
    assert sums.loss.item() == pytest.approx(ce + 0.25 * z, rel=1e-12)


@settings(max_examples=60)
@given(
    rows=st.integers(1, 13),
    padding=st.sampled_from([0, 1, 5]),
    softcap=st.sampled_from([None, 0.7, 30.0]),
    z_loss_coef=st.sampled_from([0.0, 0.3]),
    chunk_rows=st.sampled_from([1, 2, 5, 100]),
    with_bias=st.booleans(),
    ids_at_once=st.sampled_from([4, 8192]),
)
def test_equals_the_reference(
    rows: int,
    padding: int,
    softcap: float | None,
    z_loss_coef: float,
    chunk_rows: int,
    with_bias: bool,
    ids_at_once: int,
) -> None:
    table = 17 + padding
    x, weight, bias, targets = inputs(rows, 6, table, 17)
    options: dict[str, Any] = {
        "bias_V": bias if with_bias else None,
        "vocab_size": 17,
        "softcap": softcap,
        "z_loss_coef": z_loss_coef,
    }
    wanted = (x, weight, bias) if with_bias else (x, weight)
    expected = linear_cross_entropy(x, weight, targets, kernels="reference", **options)
    with mock.patch.object(cross_entropy, "IDS_AT_ONCE", ids_at_once):
        actual = linear_cross_entropy(x, weight, targets, chunk_bytes=4 * table * chunk_rows, **options)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    mine = gradients(actual, *wanted)
    torch.testing.assert_close(mine, gradients(expected, *wanted), rtol=1e-10, atol=1e-12)
    assert not mine[1][17:].any()  # rows that pad the vocabulary
    with torch.no_grad():
        evaluated = linear_cross_entropy(x, weight, targets, chunk_bytes=4 * table * chunk_rows, **options)
    torch.testing.assert_close(evaluated, expected, rtol=1e-12, atol=1e-12)


def test_gradients_of_chunks_and_pieces_in_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "IDS_AT_ONCE", 8)
    x, weight, _, targets = inputs(40, 32, 29, 29)
    rounded = [t.detach().bfloat16().requires_grad_() for t in (x, weight)]
    exact = [t.detach().double().requires_grad_() for t in rounded]
    sums = linear_cross_entropy(rounded[0], rounded[1], targets, chunk_bytes=4 * 29 * 11)
    expected = linear_cross_entropy(exact[0], exact[1], targets, kernels="reference")
    for mine, wanted in zip(gradients(sums, *rounded), gradients(expected, *exact), strict=True):
        assert (mine.double() - wanted).abs().max() < 0.02 * wanted.abs().max()


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_gradcheck(softcap: float | None) -> None:
    x, weight, bias, targets = inputs(5, 3, 8, 7)

    def loss(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return linear_cross_entropy(
            x, weight, targets, bias_V=bias, vocab_size=7, softcap=softcap, z_loss_coef=0.1, chunk_bytes=64
        ).loss

    assert torch.autograd.gradcheck(loss, (x, weight, bias))


def test_the_gradient_is_scaled_by_what_comes_from_above() -> None:
    x, weight, _, targets = inputs()
    sums = linear_cross_entropy(x, weight, targets)
    plain = gradients(sums._replace(loss=sums.loss * 1.0), x, weight)
    again = linear_cross_entropy(x, weight, targets)
    torch.testing.assert_close(gradients(again._replace(loss=again.loss / 7), x, weight), tuple(g / 7 for g in plain))


def test_a_graph_that_is_kept_gives_the_same_gradients_again() -> None:
    x, weight, _, targets = inputs()
    loss = linear_cross_entropy(x, weight, targets).loss / 7
    first = torch.autograd.grad(loss, (x, weight), retain_graph=True)
    copies = tuple(g.clone() for g in first)
    torch.testing.assert_close(torch.autograd.grad(loss, (x, weight), retain_graph=True), copies, rtol=0, atol=0)
    torch.testing.assert_close(torch.autograd.grad(loss, (x, weight)), copies, rtol=0, atol=0)
    torch.testing.assert_close(first, copies, rtol=0, atol=0)


def test_the_backward_pass_makes_no_tensor_as_large_as_the_table() -> None:
    x, weight, _, targets = inputs(8, 6, 5000, 5000, dtype=torch.float32)
    loss = linear_cross_entropy(x, weight, targets).loss / 7
    with Allocations() as allocations:
        loss.backward()
    assert weight.grad is not None
    assert weight.grad.any()
    assert allocations.largest < weight.numel() * 4


def test_only_the_weighted_sum_is_differentiable() -> None:
    x, weight, _, targets = inputs()
    for kernels in ("auto", "reference"):
        sums = linear_cross_entropy(x, weight, targets, z_loss_coef=0.1, kernels=kernels)
        assert sums.loss.requires_grad
        assert not sums.ce.requires_grad
        assert not sums.z.requires_grad


def test_frozen_head_gets_no_gradient() -> None:
    x, weight, _, targets = inputs()
    weight = weight.detach()
    expected = gradients(linear_cross_entropy(x, weight, targets, kernels="reference"), x)
    sums = linear_cross_entropy(x, weight, targets, chunk_bytes=1)
    torch.testing.assert_close(gradients(sums, x), expected)


def test_all_ignored_and_no_rows() -> None:
    x, weight, _, targets = inputs()
    sums = linear_cross_entropy(x, weight, torch.full_like(targets, -100), z_loss_coef=1.0)
    assert sums.loss.item() == sums.ce.item() == sums.z.item() == 0.0
    assert not any(grad.any() for grad in gradients(sums, x, weight))
    empty = linear_cross_entropy(x[:0], weight, targets[:0])
    assert empty.ce.item() == 0.0
    assert gradients(empty, x, weight)[1].shape == weight.shape


def test_large_logits_stay_finite() -> None:
    x, weight, _, targets = inputs()
    sums = linear_cross_entropy(x * 1e4, weight, targets, softcap=None)
    assert torch.isfinite(sums.ce)
    assert all(torch.isfinite(grad).all() for grad in gradients(sums, x, weight))


@pytest.mark.parametrize("softcap", [None, 20.0])
def test_bf16_products_fp32_statistics(softcap: float | None) -> None:
    x, weight, _, targets = inputs(64, 32, 101, 101, dtype=torch.float32)
    options: dict[str, Any] = {"softcap": softcap, "z_loss_coef": 1e-2}
    exact = linear_cross_entropy(x.to(torch.bfloat16).float(), weight.to(torch.bfloat16).float(), targets, **options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = linear_cross_entropy(x, weight, targets, kernels="reference", **options)
        fused = linear_cross_entropy(x, weight, targets, chunk_bytes=4 * 101 * 7, **options)
    assert fused.ce.dtype == torch.float32
    torch.testing.assert_close(fused, plain, rtol=1e-5, atol=0)  # the same rounded logits
    assert abs(fused.ce - exact.ce) / exact.ce < 5e-3
    mine, theirs = gradients(fused, x, weight), gradients(plain, x, weight)
    for a, b in zip(mine, theirs, strict=True):
        assert a.dtype == torch.float32
        assert (a - b).abs().max() / b.abs().max() < 2e-2


@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_autocast_leaves_fp64_alone(kernels: Any) -> None:
    x, weight, _, targets = inputs()
    expected = linear_cross_entropy(x, weight, targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = linear_cross_entropy(x, weight, targets, kernels=kernels)
    torch.testing.assert_close(inside, expected, rtol=1e-12, atol=0)


def test_autocast_products_keep_the_inputs_dtype_of_gradients() -> None:
    x, weight, _, targets = inputs(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        grads = gradients(linear_cross_entropy(x, weight, targets, chunk_bytes=4 * 29 * 3), x, weight)
    exact = gradients(linear_cross_entropy(x, weight, targets, chunk_bytes=4 * 29 * 3), x, weight)
    for rounded, grad in zip(grads, exact, strict=True):
        assert rounded.dtype == torch.float32
        assert not torch.equal(rounded, grad)  # rounded products, not fp32 in disguise


class Allocations(TorchDispatchMode):
    """Most bytes of tensors made inside that were alive at one time, and the largest of them."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.largest = 0
        self._known: set[int] = set()

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inside = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if not isinstance(tensor, Tensor):
                continue
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key not in self._known and key not in inside:
                self._known.add(key)
                weakref.finalize(storage, self._freed, key, size)
                self.live += size
                self.largest = max(self.largest, size)
        self.peak = max(self.peak, self.live)
        return out


def test_memory_is_a_fraction_of_the_plain_way() -> None:
    x, weight, _, targets = inputs(128, 8, 50_257, 50_257, dtype=torch.float32)
    logits = 128 * 50_257 * 4

    def measure(**options: Any) -> Allocations:
        with Allocations() as allocations:
            gradients(linear_cross_entropy(x, weight, targets, softcap=30.0, **options), x, weight)
        return allocations

    plain = measure(kernels="reference")
    fused = measure(chunk_bytes=logits // 32)
    assert plain.largest >= logits
    assert fused.largest <= logits / 8
    assert fused.peak < plain.peak / 10


@pytest.mark.slow
def test_compiled_equals_eager(compiling: None) -> None:
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        x, weight, bias, targets = inputs(13, 6, 24, 20, dtype=dtype)
        options: dict[str, Any] = {"bias_V": bias, "vocab_size": 20, "softcap": 3.0, "z_loss_coef": 0.1}
        eager = linear_cross_entropy(x, weight, targets, chunk_bytes=4 * 24 * 5, **options)
        fast = linear_cross_entropy(x, weight, targets, chunk_bytes=4 * 24 * 5, compile=True, **options)
        torch.testing.assert_close(fast, eager, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(
            gradients(fast, x, weight, bias), gradients(eager, x, weight, bias), rtol=tolerance, atol=tolerance
        )


def test_equals_pytorch() -> None:
    x, weight, _, targets = inputs()
    expected = F.cross_entropy(x @ weight.T, targets, reduction="sum")
    torch.testing.assert_close(linear_cross_entropy(x, weight, targets).ce, expected.detach())
