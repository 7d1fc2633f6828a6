"""The real kernels against graft's reference. They need a GPU, and all but FlexAttention a package."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from kernel_doubles import DIRECTIONS, NAMES, config, packed

from graft.contracts.subject import loud
from graft.model import Model, build_model
from graft.network.kernels import kernels_in_use
from graft.ops.kernels import KERNELS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="these kernels need a GPU")

PACKAGES = {kernel.name: kernel.package for kernel in KERNELS}


def outcome(built: Model, segments: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """Logits and gradients under bf16 autocast, which every kernel computes in."""
    ids = torch.randint(31, (2, 12), generator=torch.Generator().manual_seed(0)).cuda()
    built.zero_grad(set_to_none=True)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        logits = built(ids, segment_ids_BT=segments)
    real = torch.ones_like(ids, dtype=torch.bool) if segments is None else segments != 0
    logits[real].sin().sum().backward()
    grads = {name: p.grad.float() for name, p in built.named_parameters() if p.grad is not None}
    return {"logits": logits[real].detach().float(), **grads}


@pytest.mark.parametrize("is_packed", [False, True], ids=["one document", "packed"])
@pytest.mark.parametrize(("tag", "bidirectional"), DIRECTIONS)
def test_the_numbers_are_graft_s(tag: str, bidirectional: bool, is_packed: bool) -> None:
    if find_spec(PACKAGES[NAMES[tag]]) is None:
        pytest.skip(f"{PACKAGES[NAMES[tag]]} is not installed")
    built = build_model(config(tag).replace(bidirectional=bidirectional), 31, seed=0)
    loud(built, 0)
    built.cuda()
    segments = packed(12).cuda() if is_packed else None
    built.set_runtime(kernels="reference")
    expected = outcome(built, segments)
    built.set_runtime(kernels=NAMES[tag], dtype=torch.bfloat16)
    found = outcome(built, segments)
    assert kernels_in_use(built.parts())[tag] == NAMES[tag]
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        error = (found[name] - value).norm() / value.norm()
        assert error < 0.05, f"{name}: off by {error:.3f} of its norm"
