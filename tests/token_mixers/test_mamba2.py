"""Mamba-2 against transformers' model, against the recurrence written out, and against its own promises."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from recurrent_checks import (
    CPU,
    ROWS,
    assert_decoding_equals_forward,
    assert_documents_are_alone,
    build,
    context,
    splits,
)
from torch.utils.flop_counter import FlopCounterMode
from transformers import Mamba2Config as TheirConfig
from transformers import Mamba2ForCausalLM

from graft.config.model import ModelConfig
from graft.errors import ConfigError
from graft.initialization import initialize
from graft.model import Model, build_model
from graft.part import parameter_roles, tensors_of
from graft.token_mixers.mamba2 import Mamba2
from graft.token_mixers.mamba2_config import Mamba2Config

SMALL: dict[str, Any] = {"d_state": 5, "head_dim": 8, "n_groups": 2, "chunk_size": 4, "projection_bias": True}


def mamba2(*, causal: bool = True, loud: bool = True, **fields: Any) -> Mamba2:
    part = build(Mamba2Config.model_validate({"type": "mamba2", **SMALL, **fields}), causal=causal)
    assert isinstance(part, Mamba2)
    with torch.no_grad():
        for name, parameter in part.named_parameters():
            if loud and "proj" not in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return part


def scanned(part: Mamba2, x: torch.Tensor, *, causal: bool) -> torch.Tensor:
    """The paper's equations for one document [T, D], head by head and position by position."""
    weights, T = dict(part.named_parameters()), x.shape[0]
    inner, shared, H = part.inner, part.num_groups * part.d_state, part.d_state
    projected = x @ weights["in_proj.weight"].mT + weights["in_proj.bias"]
    z, mixed, dt = projected.split([inner, inner + 2 * shared, part.num_heads], dim=-1)
    width = weights["conv.weight"].shape[1]
    ahead = 0 if causal else (width - 1) // 2
    padded = F.pad(mixed.mT, (width - 1 - ahead, ahead))
    mixed = F.silu(F.conv1d(padded, weights["conv.weight"][:, None], weights["conv.bias"], groups=len(padded))).mT
    steps = (dt + weights["dt_bias"]).exp().log1p()
    heads = []
    for n in range(part.num_heads):
        group = n // (part.num_heads // part.num_groups)
        inputs = mixed[:, n * part.head_dim : (n + 1) * part.head_dim]
        B = mixed[:, inner + group * H : inner + (group + 1) * H]
        C = mixed[:, inner + shared + group * H : inner + shared + (group + 1) * H]
        rows = []
        for t in range(T):
            y = weights["D"][n] * inputs[t]
            for s in range(t + 1 if causal else T):
                between = steps[s + 1 : t + 1, n] if s <= t else steps[t:s, n]
                faded = (-weights["A_log"][n].exp() * between.sum()).exp()
                y = y + faded * (C[t] @ B[s]) * steps[s, n] * inputs[s]
            rows.append(y)
        heads.append(torch.stack(rows))
    gated = (torch.cat(heads, -1) * F.silu(z)).unflatten(-1, (part.num_groups, -1))
    normed = (gated / (gated.square().mean(-1, keepdim=True) + 1e-5).sqrt()).flatten(-2)
    return (normed * weights["norm.weight"]) @ weights["out_proj.weight"].mT + weights["out_proj.bias"]


@pytest.mark.parametrize("kernels", ["auto", "reference"])
@pytest.mark.parametrize("causal", [True, False])
def test_values_and_gradients_are_those_of_the_recurrence(causal, kernels):
    part = mamba2(causal=causal)
    part.kernels = kernels
    x = torch.randn(2, 7, 24, dtype=torch.float64, requires_grad=True)
    pair = part(x, context(x, causal=causal)).y, torch.stack([scanned(part, row, causal=causal) for row in x])
    torch.testing.assert_close(*pair, rtol=1e-9, atol=1e-10)
    weights, inputs = torch.randn_like(x), [x, *part.parameters()]
    gradients = [torch.autograd.grad((y * weights).sum(), inputs, retain_graph=True) for y in pair]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


def models(n_groups: int) -> tuple[Model, Mamba2ForCausalLM]:
    """Two layers of ours with the weights of transformers' model, copied by name."""
    torch.manual_seed(0)
    theirs = Mamba2ForCausalLM(
        TheirConfig(
            vocab_size=31,
            hidden_size=16,
            state_size=6,
            num_hidden_layers=2,
            num_heads=4,
            head_dim=8,
            n_groups=n_groups,
            chunk_size=4,
            tie_word_embeddings=False,
        )
    ).eval()
    config = ModelConfig.model_validate(
        {
            "hidden_size": 16,
            "num_layers": 2,
            "norm": {"type": "rms_norm", "eps": 1e-5},
            "blocks": {"b": [{"type": "mamba2", "d_state": 6, "head_dim": 8, "n_groups": n_groups, "chunk_size": 5}]},
            "head": {"tie_word_embeddings": False},
        }
    )
    ours = build_model(config, 31, seed=0, device="cpu").eval()
    ours.load_state_dict(translated(theirs.state_dict()))
    return ours, theirs


def translated(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    ours = {}
    for name, tensor in weights.items():
        if name.endswith("conv1d.weight"):
            tensor = tensor[:, 0]
        for old, new in (
            ("backbone.embeddings.weight", "embedding.weight"),
            ("backbone.norm_f.", "final_norm."),
            ("lm_head.", "head."),
            (".mixer.conv1d.", ".mamba2.part.conv."),
            (".mixer.", ".mamba2.part."),
            ("backbone.layers.0.norm.", "layers.0.mamba2.norm."),
            ("backbone.layers.1.norm.", "layers.1.mamba2.norm."),
            ("backbone.", ""),
        ):
            name = name.replace(old, new)
        ours[name] = tensor.clone()
    return ours


@pytest.mark.parametrize("n_groups", [1, 2])
def test_transformers_gives_the_same_logits_and_gradients(n_groups):
    ours, theirs = models(n_groups)
    ids = torch.randint(31, (2, 13))
    logits = ours(ids), theirs(ids).logits
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-5)
    for y in logits:
        F.cross_entropy(y[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    wanted = translated({n: p.grad for n, p in theirs.named_parameters() if p.grad is not None})
    found = {n: p.grad for n, p in ours.named_parameters() if p.grad is not None}
    assert found.keys() == wanted.keys()
    for name, grad in wanted.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-3, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


@torch.no_grad()
def test_transformers_decodes_the_same_with_its_cache():
    ours, theirs = models(1)
    ids = torch.randint(31, (2, 9))
    state, cache = ours.init_state(2, 9), None
    for start, end in ((0, 5), (5, 6), (6, 7), (7, 8), (8, 9)):
        logits, state = ours.decode(ids[:, start:end], state)
        out = theirs(ids[:, start:end], cache_params=cache, use_cache=True)
        cache = out.cache_params
        torch.testing.assert_close(logits, out.logits, rtol=1e-4, atol=1e-5)


@settings(max_examples=25)
@given(sizes=splits(11), packed=st.booleans())
def test_decoding_in_any_chunks_equals_the_forward(sizes, packed):
    assert_decoding_equals_forward(mamba2(), sizes, packed=packed)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_documents_are_alone(causal, kernels):
    part = mamba2(causal=causal)
    part.kernels = kernels
    assert_documents_are_alone(part, causal=causal)


def test_padding_leaves_the_scan_alone():
    part = mamba2()
    x = torch.randn(3, 8, 24, dtype=torch.float64)
    state = part.init_state(3, 11, device=CPU, dtype=x.dtype)
    before = part(x[:, :5], context(x[:, :5], torch.tensor(ROWS)[:, :5]), state).state
    after = part(x[:, 5:], context(x[:, 5:], torch.zeros(3, 3, dtype=torch.int64)), before).state
    for a, b in zip(after.scan, before.scan, strict=True):
        assert torch.equal(a, b)


def test_the_start_is_that_of_the_paper():
    part = mamba2(loud=False, expand=100, head_dim=1, n_groups=1, dt_init_floor=2e-3)
    steps, rates = F.softplus(part.dt_bias), part.A_log.exp()
    assert len(steps) == 2400
    assert steps.min().item() == pytest.approx(2e-3, rel=1e-4), "raised to the floor, which is above dt_min"
    assert 0.09 < steps.max() < 0.1
    assert steps.log().mean().item() == pytest.approx(
        # log-uniform in [0.001, 0.1], with what lies below 0.002 moved up to it
        (math.log(2) * math.log(0.002) + math.log(50) * (math.log(0.1) + math.log(0.002)) / 2) / math.log(100),
        abs=0.05,
    )
    assert 1.0 <= rates.min() < 1.1
    assert 15.9 < rates.max() <= 16.0
    assert rates.mean().item() == pytest.approx(8.5, abs=0.3)
    assert (part.D == 1).all()
    other = mamba2(loud=False)
    initialize(other, seed=2)
    assert not torch.equal(other.A_log, mamba2(loud=False).A_log)


def test_the_state_is_of_one_size_whatever_the_length():
    part = mamba2()
    scan = 6 * 5 * 8  # heads, d_state, head_dim
    conv = 3 * (48 + 2 * 2 * 5)
    integers = 8 * (3 + 2)
    assert part.state_bytes(9, torch.float32) == part.state_bytes(10**6, torch.float32) == 4 * (scan + conv) + integers
    assert part.state_bytes(9, torch.bfloat16) == 4 * scan + 2 * conv + integers
    state = part.init_state(2, 9, device=torch.device("meta"), dtype=torch.bfloat16)
    assert {t.device.type for t in tensors_of(state)} == {"meta"}


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("T", [16, 11, 3])
def test_counted_flops_are_those_of_the_forward(T, causal):
    part = mamba2(causal=causal)
    x = torch.randn(2, T, 24, dtype=torch.float64)
    with FlopCounterMode(display=False) as counter:
        part(x, context(x, causal=causal))
    assert counter.get_total_flops() == pytest.approx(2 * T * part.flops_per_token(T), rel=1e-12)


def test_long_sequences_stay_finite_in_bf16():
    part = mamba2(chunk_size=64).bfloat16()
    x = torch.randn(1, 2000, 24, dtype=torch.bfloat16, requires_grad=True)
    y = part(x, context(x)).y
    gradients = torch.autograd.grad(y.float().square().sum(), [x, *part.parameters()])
    assert y.dtype == torch.bfloat16
    assert all(t.isfinite().all() for t in (y, *gradients))


def test_roles_keep_rates_out_of_decay_and_of_muon():
    roles = parameter_roles(mamba2())
    assert {n for n, role in roles.items() if role == "scalar"} == {"dt_bias", "A_log", "D"}
    assert {n for n, role in roles.items() if role == "mamba"} == {"in_proj.weight", "out_proj.weight"}
    assert roles["conv.weight"] == "conv"
    assert roles["norm.weight"] == "norm"
    assert roles["conv.bias"] == roles["in_proj.bias"] == "bias"
    plain = mamba2(conv_bias=False, projection_bias=False)
    assert {n for n, _ in plain.named_parameters()} == roles.keys() - {"conv.bias", "in_proj.bias", "out_proj.bias"}


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"head_dim": 7}, "head_dim"),
        ({"n_groups": 4}, "n_groups"),
    ],
)
def test_sizes_that_do_not_fit_are_an_error(fields, path):
    with pytest.raises(ConfigError, match="does not divide"):
        mamba2(**fields)
    problems = list(Mamba2Config.model_validate({"type": "mamba2", **SMALL, **fields}).problems_in(24))
    assert [p.path for p in problems] == [(path,)]
    assert not list(Mamba2Config.model_validate({"type": "mamba2", **SMALL}).problems_in(24))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dt_min": 0.2}, "dt_min"),
        ({"a_init_min": 20.0}, "a_init_min"),
        ({"dt_init_floor": 0.5}, "dt_init_floor"),
    ],
)
def test_starts_that_make_no_sense_are_an_error(fields, message):
    with pytest.raises(ValueError, match=message):
        Mamba2Config.model_validate({"type": "mamba2", **fields})
