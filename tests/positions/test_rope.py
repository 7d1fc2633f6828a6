"""Rotary positions against their defining property, and scalings against transformers."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from graft.errors import ConfigError
from graft.positions.rope import Rope, attention_factor, inverse_frequencies
from graft.positions.rope_config import RopeConfig

YARN = {"type": "yarn", "factor": 4.0, "original_max_seq_len": 64, "beta_fast": 8.0, "beta_slow": 2.0}
LLAMA3 = {"type": "llama3", "factor": 8.0, "original_max_seq_len": 256}
LINEAR = {"type": "linear", "factor": 3.0}


def rope(head_dim=16, **fields) -> Rope:
    return RopeConfig(**fields).build(2, head_dim)


def encode(module: Rope, x_BTNH: torch.Tensor, positions: list[int]) -> torch.Tensor:
    return module.encode(x_BTNH, module.tables(torch.tensor([positions])))


@pytest.mark.parametrize("scaling", [None, LINEAR, YARN, LLAMA3])
@pytest.mark.parametrize("share", [1.0, 0.5])
def test_scores_depend_on_the_distance_alone(scaling, share):
    module = rope(scaling=scaling, partial_rotary_factor=share)
    q, k = torch.randn(2, 1, 1, 2, 16)

    def score(m, n):
        return (encode(module, q, [m]) * encode(module, k, [n])).sum(-1)

    torch.testing.assert_close(score(11, 4), score(107, 100), rtol=1e-4, atol=1e-4)
    assert (score(11, 4) - score(4, 11)).abs().min() > 1e-3, "the sign of the distance counts"


def test_closed_form_of_one_pair():
    """Two channels turn by position · theta^0 radians; the norm stays."""
    out = encode(rope(head_dim=2), torch.tensor([1.0, 0.0]).view(1, 1, 1, 2), [3])
    torch.testing.assert_close(out.flatten(), torch.tensor([math.cos(3.0), math.sin(3.0)]))


def test_position_zero_and_channels_past_the_rotary_ones_stay():
    x = torch.randn(1, 2, 2, 16)
    out = encode(rope(partial_rotary_factor=0.25), x, [0, 9])
    torch.testing.assert_close(out[:, 0], x[:, 0], rtol=0, atol=0)
    assert torch.equal(out[..., 4:], x[..., 4:])
    assert (out[:, 1, :, :4] != x[:, 1, :, :4]).all()


def test_pairs_are_those_of_llama():
    module, x, positions = rope(), torch.randn(1, 5, 2, 16), torch.tensor([[0, 1, 2, 7, 40]])
    angles = positions[..., None] * inverse_frequencies(module.config, 16, x.device)
    cos, sin = (f(torch.cat((angles, angles), -1)) for f in (torch.cos, torch.sin))
    wanted, _ = apply_rotary_pos_emb(x.transpose(1, 2), x.transpose(1, 2), cos, sin)
    torch.testing.assert_close(module.encode(x, module.tables(positions)), wanted.transpose(1, 2))


@pytest.mark.parametrize(
    ("name", "scaling", "theirs"),
    [
        ("linear", LINEAR, {"factor": 3.0}),
        (
            "yarn",
            YARN,
            {"factor": 4.0, "beta_fast": 8.0, "beta_slow": 2.0, "original_max_position_embeddings": 64},
        ),
        (
            "llama3",
            LLAMA3,
            {
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 256,
            },
        ),
    ],
)
@pytest.mark.parametrize("theta", [100.0, 10_000.0, 500_000.0])
def test_scalings_equal_transformers(name, scaling, theirs, theta):
    head_dim = 64
    config = LlamaConfig(
        hidden_size=128,
        num_attention_heads=2,
        head_dim=head_dim,
        max_position_embeddings=512,
        rope_parameters={"rope_type": name, "rope_theta": theta, **theirs},
    )
    wanted, factor = ROPE_INIT_FUNCTIONS[name](config, torch.device("cpu"))
    ours = RopeConfig(theta=theta, scaling=scaling)
    torch.testing.assert_close(inverse_frequencies(ours, head_dim, torch.device("cpu")), wanted, rtol=1e-6, atol=0)
    assert attention_factor(ours) == pytest.approx(factor)


def test_the_attention_factor_multiplies_both_tables():
    positions = torch.tensor([[0, 5]])
    plain = rope(scaling={**YARN, "attention_factor": 1.0}).tables(positions)
    scaled = rope(scaling={**YARN, "attention_factor": 1.5}).tables(positions)
    for a, b in zip(plain, scaled, strict=True):
        torch.testing.assert_close(1.5 * a, b)


def test_equal_configs_share_tables_and_others_do_not():
    assert rope().table_key == rope().table_key
    kinds = [rope(), rope(theta=1e6), rope(head_dim=32), rope(scaling=LINEAR), rope(scaling=YARN)]
    assert len({r.table_key for r in kinds}) == len(kinds)


def test_tables_are_fp32_and_keep_the_dtype_of_what_they_turn():
    module = rope()
    tables = module.tables(torch.tensor([[100_000]]))
    assert {t.dtype for t in tables} == {torch.float32}
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        assert module.encode(torch.ones(1, 1, 2, 16, dtype=dtype), tables).dtype == dtype


@pytest.mark.parametrize(("head_dim", "share"), [(7, 1.0), (10, 0.5), (16, 0.05)])
def test_an_odd_or_empty_rotation_is_an_error(head_dim, share):
    with pytest.raises(ConfigError, match="rotated channels"):
        rope(head_dim, partial_rotary_factor=share)
