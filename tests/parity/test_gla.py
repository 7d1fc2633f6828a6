"""Our gated linear attention is flash-linear-attention's layer, with its plain form of the recurrence, in fp64.

Their g_proj is our gate_proj, the two maps of gk_proj are decay_down_proj and decay_up_proj, g_norm is head_norm, and
the logits' normaliser is our gate_temperature.
"""

from __future__ import annotations

import oracles
import pytest
import torch
from layers import Layers, our_layer

B, T, D, N, RANK, EPS = 2, 19, 12, 3, 5, 1e-2
NAMES = {"g_proj": "gate_proj", "gk_proj.0": "decay_down_proj", "gk_proj.1": "decay_up_proj", "g_norm": "head_norm"}


def our_name(name: str) -> str:
    module, parameter = name.rsplit(".", 1)
    return f"{NAMES.get(module, module)}.{parameter}"


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_values_and_gradients(kernels: str, bidirectional: bool) -> None:
    mixer = {"type": "gla", "num_heads": N, "gate_low_rank_dim": RANK, "gate_temperature": 4.0}
    sizes = {"hidden_size": D, "num_heads": N, "gate_low_rank_dim": RANK}
    layer = oracles.fla_gla(bidirectional=bidirectional)
    theirs = layer(**sizes, gate_logit_normalizer=4, norm_eps=EPS, fuse_norm=False).double()
    ours = our_layer(D, mixer, kernels=kernels, eps=EPS, bidirectional=bidirectional)
    layers = Layers(ours, theirs, our_name)
    layers.assert_same(torch.randn(B, T, D, dtype=torch.float64), lambda x: theirs(x)[0], 1e-12)
