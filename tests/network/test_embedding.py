"""Factorised embeddings, convolutions over embeddings, the layer before the head: formulas, contracts, cost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch.utils.flop_counter import FlopCounterMode

from graft.config.model import ModelConfig
from graft.contracts.registry import SLOW, contracts_for
from graft.contracts.subject import Subject
from graft.cost.counts import embedding_state_bytes
from graft.cost.live_bytes import LiveBytes
from graft.data.batch import IGNORED_TARGET
from graft.model import Model, build_model
from graft.objectives.base import predict
from graft.objectives.causal_lm_config import CausalLMConfig
from graft.part import linear_flops, parameter_roles, tensors_of
from graft.training.throughput import forward_flops_per_token

D, R, V = 16, 6, 31
ATTENTION = {"type": "attention", "num_heads": 2, "position": {"type": "rope"}}
MLP = {"type": "mlp", "intermediate_size": 12}
FULL, DEPTHWISE = {"kernel_size": 3}, {"kernel_size": 4, "depthwise": True, "bias": False}
LEARNED = {"type": "learned", "max_seq_len": 64}
TRANSFORM = {"activation": "gelu", "norm": {"type": "layer_norm"}}


def config(embedding: dict[str, Any], head: dict[str, Any] | None = None, **model: Any) -> ModelConfig:
    mixer = model.pop("mixer", ATTENTION)
    base = {"hidden_size": D, "num_layers": 1, "norm": {"type": "rms_norm"}, "blocks": {"b": [mixer, MLP]}}
    return ModelConfig.model_validate({**base, "embedding": embedding, "head": head or {}, **model})


def subject(*args: Any, **kwargs: Any) -> Subject:
    return Subject(config(*args, **kwargs), CausalLMConfig(z_loss_coef=1e-3))


def loud(*args: Any, **kwargs: Any) -> Model:
    return subject(*args, **kwargs).model


IDS = torch.randint(V, (2, 9), generator=torch.Generator().manual_seed(1))
SEGMENTS = torch.tensor([[4, 4, 4, 4, 2, 2, 2, 0, 0], [0, 1, 1, 1, 1, 1, 1, 1, 1]])


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("size", [R, None])
def test_everything_in_its_order(size: int | None, bidirectional: bool) -> None:
    model = loud(
        {
            "size": size,
            "projection_bias": size is not None,
            "scale": 3.0,
            "conv": FULL,
            "position": LEARNED,
            "token_type": True,
            "norm": {"type": "layer_norm"},
        },
        bidirectional=bidirectional,
    )
    p = {name.removeprefix("embedding."): t for name, t in model.named_parameters() if name.startswith("embedding.")}
    x = 3.0 * p["weight"][IDS]
    around = (1, 1) if bidirectional else (2, 0)
    x = F.conv1d(F.pad(x.mT, around), p["conv.weight"], p["conv.bias"]).mT
    x = x + p["position.weight"][:9] + p["token_type"]
    x = F.layer_norm(x, x.shape[-1:], p["norm.weight"], p["norm.bias"])
    if size is not None:
        x = x @ p["projection.weight"].T + p["projection.bias"]
    torch.testing.assert_close(model.embedding(IDS, torch.arange(9)[None])[0], x)


def test_a_depthwise_convolution_has_a_kernel_per_channel() -> None:
    model = loud({"size": R, "conv": DEPTHWISE})
    table, kernel = model.embedding.weight[IDS], model.get_parameter("embedding.conv.weight")
    wanted = F.conv1d(F.pad(table.mT, (3, 0)), kernel[:, None], groups=R).mT
    wanted = wanted @ model.get_parameter("embedding.projection.weight").T
    torch.testing.assert_close(model.embedding(IDS, torch.arange(9)[None])[0], wanted)


@pytest.mark.parametrize(("kernel_size", "bidirectional", "reach"), [(4, False, (-3, 0)), (4, True, (-2, 1))])
@pytest.mark.parametrize("depthwise", [False, True])
def test_reach_of_even_kernels(kernel_size: int, bidirectional: bool, reach: tuple[int, int], depthwise: bool) -> None:
    conv = {"kernel_size": kernel_size, "depthwise": depthwise}
    model = loud({"conv": conv}, bidirectional=bidirectional)
    ids = torch.arange(11)[None]
    (grad,) = torch.autograd.grad(model.embedding(ids, ids)[0][0, 5].sum(), model.embedding.weight)
    assert (grad[:11].abs().sum(-1) > 0).tolist() == [reach[0] <= t - 5 <= reach[1] for t in range(11)]


def test_the_tied_head_is_the_transposed_factorisation() -> None:
    model = loud({"size": R, "projection_bias": True}, {"bias": True, "logit_softcap": 5.0})
    x, p = torch.randn(2, 9, D, dtype=torch.float64), dict(model.named_parameters())
    table_VD = p["embedding.weight"] @ p["embedding.projection.weight"].T
    wanted = 5.0 * torch.tanh((x @ table_VD.T + p["head.bias"]) / 5.0)
    torch.testing.assert_close(model.logits(x), wanted)
    assert "head.weight" not in p


@pytest.mark.parametrize(
    ("embedding", "head", "width"),
    [
        ({"size": R}, {}, R),
        ({"size": R}, {"transform": TRANSFORM}, R),
        ({"size": R}, {"transform": {**TRANSFORM, "size": R}}, R),
        ({"size": R}, {"tie_word_embeddings": False}, D),
        ({"size": R}, {"transform": {**TRANSFORM, "size": 10}, "tie_word_embeddings": False}, 10),
        ({}, {"transform": TRANSFORM}, D),
    ],
)
def test_head_transform_by_hand_and_the_fused_loss_of_every_head(
    embedding: dict[str, Any], head: dict[str, Any], width: int
) -> None:
    model = loud(embedding, {**head, "pad_vocab_to_multiple_of": 8, "bias": True})
    p = dict(model.named_parameters())
    x = torch.randn(2, 9, D, dtype=torch.float64, requires_grad=True)
    h = x
    if "transform" in head:
        h = F.gelu(h @ p["head.transform.weight"].T + p["head.transform.bias"])
        h = F.layer_norm(h, h.shape[-1:], p["head.transform.norm.weight"], p["head.transform.norm.bias"])
    if "head.weight" not in p and h.shape[-1] != model.embedding.weight.shape[1]:
        h = h @ p["embedding.projection.weight"]
    assert model.head_weight().shape == (32, width)
    logits = (h @ model.head_weight().T + p["head.bias"])[..., :V]
    torch.testing.assert_close(model.logits(x), logits)
    targets = IDS.masked_fill(IDS % 3 == 0, IGNORED_TARGET)
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    model.set_runtime(loss_chunk_bytes=4 * 32 * 5)  # several chunks
    actual = predict(model, x, targets, z_loss_coef=0.0).loss
    torch.testing.assert_close(actual, expected)
    used = [x, *(t for name, t in p.items() if name.startswith("head.")), model.head_weight()]
    torch.testing.assert_close(torch.autograd.grad(actual, used), torch.autograd.grad(expected, used))


def test_no_matrix_of_vocabulary_times_width_is_formed() -> None:
    model = build_model(config({"size": 2}), 100_000, seed=0)
    with LiveBytes() as live, torch.no_grad():
        model(IDS[:1, :1])
    assert live.peak < 4 * 100_000 * D / 2  # the table and one row of logits are seen, 3 numbers per id


def test_the_stream_keeps_its_precision_behind_the_projection() -> None:
    model = build_model(config({"size": R, "conv": FULL}), V, seed=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model.embedding(IDS, torch.arange(9)[None])[0].dtype == torch.float32


def test_roles_and_starts() -> None:
    wide = config({"size": 64, "conv": FULL, "token_type": True}, {"transform": TRANSFORM}, hidden_size=256)
    model = build_model(wide, 2000, seed=0)
    roles = parameter_roles(model)
    assert {name: role for name, role in roles.items() if not name.startswith("layers.")} == {
        "embedding.weight": "embedding",
        "embedding.token_type": "embedding",
        "embedding.conv.weight": "conv",
        "embedding.conv.bias": "bias",
        "embedding.projection.weight": "other",
        "head.transform.weight": "other",
        "head.transform.bias": "bias",
        "head.transform.norm.weight": "norm",
        "head.transform.norm.bias": "bias",
        "final_norm.weight": "norm",
    }
    spreads = {
        "embedding.weight": 0.02,
        "embedding.token_type": 0.02,
        "embedding.conv.weight": (3 * 3 * 64) ** -0.5,
        "embedding.projection.weight": 64**-0.5,
        "head.transform.weight": 0.02,
    }
    for name, std in spreads.items():
        assert model.get_parameter(name).std().item() == pytest.approx(std, rel=0.25), name
    product = model.embedding.weight @ model.get_parameter("embedding.projection.weight").T
    assert product.std().item() == pytest.approx(0.02, rel=0.03)  # the spread of a table of full width


def test_state_bytes_are_those_of_the_convolution_and_exact() -> None:
    model = build_model(config({"size": R, "conv": {"kernel_size": 5}}), V, seed=0)
    state = model.init_state(3, 50)
    assert sum(t.numel() * t.element_size() for t in tensors_of(state.embedding)) == 3 * (4 * R * 4 + 4 * 8)
    assert embedding_state_bytes(model, torch.float32) == 4 * R * 4 + 4 * 8
    assert embedding_state_bytes(model, torch.bfloat16) == 4 * R * 2 + 4 * 8
    assert embedding_state_bytes(build_model(config({}), V, seed=0), torch.float32) == 0
    encoder = config({"conv": FULL}, bidirectional=True)
    assert embedding_state_bytes(build_model(encoder, V, seed=0), torch.float32) == 0


@pytest.mark.parametrize("embedding", [{"size": R, "conv": {"kernel_size": 5}}, {"conv": DEPTHWISE}, {"size": R}])
@pytest.mark.parametrize("head", [{}, {"transform": TRANSFORM}, {"tie_word_embeddings": False, "bias": True}])
def test_flops_equal_those_traced(embedding: dict[str, Any], head: dict[str, Any]) -> None:
    model = build_model(config(embedding, head, bidirectional=True), V, seed=0)
    model.set_runtime(kernels="reference")
    model.embedding.kernels = "auto"
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(IDS[:1])
    assert 9 * forward_flops_per_token(model, 9) == counter.get_total_flops()


def test_decoding_one_token_multiplies_each_tap_once() -> None:
    model = build_model(config({"size": R, "conv": {"kernel_size": 7}}, mixer=MLP), V, seed=0)
    state = model.init_state(1, 4)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.decode(IDS[:1, :1], state)
    parts = sum(linear_flops(part) for part in model.parts())
    assert counter.get_total_flops() == parts + 2 * 7 * R * R + 2 * R * D + 2 * (D * R + V * R)


NETWORKS: dict[str, dict[str, Any]] = {
    "factorised": {"embedding": {"size": R}},
    "untied": {"embedding": {"size": R, "projection_bias": True}, "head": {"tie_word_embeddings": False}},
    "full conv": {"embedding": {"conv": FULL, "token_type": True}, "loops": 2},
    "depthwise conv": {"embedding": {"conv": DEPTHWISE}, "head": {"transform": TRANSFORM, "bias": True}},
    "both, long kernel": {"embedding": {"size": R, "conv": {"kernel_size": 15}, "norm": {"type": "layer_norm"}}},
    "albert's head": {"embedding": {"size": R}, "head": {"transform": {**TRANSFORM, "size": R}}},
}


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_contracts(name: str, bidirectional: bool) -> None:
    examined = subject(**NETWORKS[name], bidirectional=bidirectional)
    for contract in contracts_for(examined):
        contract(examined)


@pytest.mark.slow
@pytest.mark.usefixtures("compiling")
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("contract", SLOW)
def test_slow_contracts(contract: Callable[[Subject], None], bidirectional: bool) -> None:
    embedding = {"size": R, "conv": FULL}
    contract(subject(embedding, {"transform": {**TRANSFORM, "size": R}}, bidirectional=bidirectional))


@pytest.mark.slow
@pytest.mark.parametrize("depthwise", [False, True])
def test_compiled_decoding_equals_eager(compiling: None, depthwise: bool) -> None:
    model = loud({"size": R, "conv": {"kernel_size": 3, "depthwise": depthwise}})
    expected = model(IDS)
    model.set_runtime(compile_decode=True)
    state, pieces = model.init_state(2, 9), []
    with torch.no_grad():
        for token in IDS.split(1, dim=1):
            logits, state = model.decode(token, state)
            pieces.append(logits)
    torch.testing.assert_close(torch.cat(pieces, 1), expected)


@pytest.mark.parametrize(
    ("embedding", "head", "message"),
    [
        ({"size": D}, {}, "needs no projection"),
        ({"projection_bias": True}, {}, "projection_bias does nothing here"),
        ({"size": R}, {"transform": {"size": 10}}, "10 channels do not fit a tied table, which takes 6 or 16"),
        ({}, {"transform": {"size": 10}}, "10 channels do not fit a tied table, which takes 16"),
        ({"conv": {"kernel_size": 1}}, {}, "greater than or equal to 2"),
    ],
)
def test_what_does_not_fit_is_refused(embedding: dict[str, Any], head: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        config(embedding, head)
