"""Newton–Schulz against the singular value decomposition."""

import pytest
import torch

from graft.ops.newton_schulz import newton_schulz, newton_schulz_reference


def matrices(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(sum(shape)))


def quintic_by_svd(g: torch.Tensor, steps: int) -> torch.Tensor:
    """The iteration acts on singular values alone: U p(p(…p(s)…)) Vᵀ, in fp64."""
    u, s, vt = torch.linalg.svd(g.double() / g.double().norm(), full_matrices=False)
    for _ in range(steps):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u @ torch.diag(s) @ vt


@pytest.mark.parametrize("shape", [(8, 8), (8, 24), (24, 8), (2, 7), (7, 2)])
@pytest.mark.parametrize("steps", [1, 5])
def test_reference_is_the_quintic_on_singular_values(shape: tuple[int, int], steps: int):
    g = matrices(*shape, dtype=torch.float64)
    torch.testing.assert_close(newton_schulz_reference(g, steps=steps), quintic_by_svd(g, steps), rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(16, 16), (12, 40), (40, 12), (3, 12, 20), (3, 20, 12)])
def test_fast_equals_reference(shape: tuple[int, ...]):
    g = matrices(*shape)
    exact = newton_schulz_reference(g.double(), steps=5)
    torch.testing.assert_close(newton_schulz(g, steps=5, dtype=torch.float32).double(), exact, rtol=0, atol=2e-5)
    error = newton_schulz(g, steps=5, dtype=torch.bfloat16).double() - exact
    # bf16 keeps 8 bits and the iteration amplifies rounding: direction within a few percent of the whole
    assert error.norm() < 0.05 * exact.norm()


def test_a_batch_equals_its_members():
    g = matrices(4, 10, 6)
    batched = newton_schulz(g, steps=5, dtype=torch.float32)
    for one, member in zip(g, batched, strict=True):
        torch.testing.assert_close(member, newton_schulz(one, steps=5, dtype=torch.float32), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(64, 256), (256, 64), (32, 128)])
def test_singular_values_gather_around_one(shape: tuple[int, int], dtype: torch.dtype):
    values = torch.linalg.svdvals(newton_schulz(matrices(*shape), steps=5, dtype=dtype).float())
    assert values.min() > 0.65
    assert values.max() < 1.25


@pytest.mark.parametrize("factor", [1e-30, 1e-12, 1e12, 1e30])
def test_the_scale_of_the_input_does_not_matter(factor: float):
    g = matrices(12, 20)
    torch.testing.assert_close(
        newton_schulz(g * factor, steps=5, dtype=torch.float32),
        newton_schulz(g, steps=5, dtype=torch.float32),
        rtol=0,
        atol=1e-4,
    )


def test_zero_gives_zero():
    assert torch.equal(newton_schulz(torch.zeros(2, 4, 6), steps=5, dtype=torch.float32), torch.zeros(2, 4, 6))
