"""Our retention is torchscale's, as one layer and as a decoder, in its parallel, recurrent and chunked modes, in fp64.

What maps to what:

- pairs that rotate: theirs are channels (2i, 2i + 1), ours (i, i + H/2): rows of q_proj and k_proj change places;
- angles: theirs are 10000^(−i/(H/2 − 1)), ours theta^(−2i/H): the same for theta = 10000^(H/(H − 2));
- decays: theirs are 1 − 2^(−5 − n), which for five heads are ours, and are replaced by ours for other numbers;
- g_proj is gate_proj, out_proj is o_proj; in the network fc1 is gate_proj, gate is up_proj, fc2 is down_proj;
- theirs divides scores by the row sum's value alone, ours lets its gradient through. The norm that follows takes a
  row's factor out again up to its eps, so gradients agree where eps is nothing, or where no row sum is above 1;
- their recurrent and chunked modes normalise otherwise, which that norm takes out too.

Theirs rounds norms and activations to fp32: here its casts to fp32 are to fp64. Tables of rotations are fp32 in both,
so that what must agree to the rounding of fp64 is without rotations (in theirs: angles of 0).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import oracles
import pytest
import torch
from layers import context
from torch import Tensor, nn
from weights import assert_close, randomize

from graft.config.model import ModelConfig
from graft.model import Model, build_model
from graft.token_mixers.retention import Retention, log_factors

H, F, LAYERS, VOCAB, T = 6, 40, 2, 43, 14
POSITIONS = {True: {"type": "rope", "theta": 10_000 ** (H / (H - 2))}, False: {"type": "none"}}
TOLERANCES = {True: 1e-5, False: 1e-9}
"""Of the largest value, with rotations and without; the latter leaves room for an eps of 1e-13 beside mean squares."""

NAMES = {
    "embed_tokens.": "embedding.",
    "layer_norm.": "final_norm.",
    "output_projection.": "head.",
    ".retention_layer_norm.": ".retention.norm.",
    ".retention.g_proj.": ".retention.part.gate_proj.",
    ".retention.out_proj.": ".retention.part.o_proj.",
    ".retention.q_proj.": ".retention.part.q_proj.",
    ".retention.k_proj.": ".retention.part.k_proj.",
    ".retention.v_proj.": ".retention.part.v_proj.",
    ".final_layer_norm.": ".mlp.norm.",
    ".ffn.fc1.": ".mlp.part.gate_proj.",
    ".ffn.gate.": ".mlp.part.up_proj.",
    ".ffn.fc2.": ".mlp.part.down_proj.",
}


@contextmanager
def in_double() -> Iterator[None]:
    """``x.float()`` keeps fp64, for as long as theirs computes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        yield


def our_name(name: str) -> str:
    """``layers.0.retention.g_proj.weight`` to ``layers.0.retention.part.gate_proj.weight``."""
    found = [(old, new) for old, new in NAMES.items() if (old in name if old[0] == "." else name.startswith(old))]
    assert len(found) == 1, name
    return name.replace(*found[0])


def our_rows(name: str, tensor: Tensor) -> Tensor:
    """Rows of q_proj and k_proj in our order: of each head first the even channels, then the odd ones."""
    if not name.endswith(("q_proj.weight", "k_proj.weight")):
        return tensor
    return tensor.unflatten(0, (-1, H // 2, 2)).transpose(1, 2).flatten(0, 2)


def theirs(heads: int, eps: float = 1e-13, *, rotated: bool = True, **more: Any) -> nn.Module:
    """A decoder with random weights, and our decays in fp64."""
    width = heads * H
    args = oracles.torchscale("architecture.config").RetNetConfig(
        decoder_embed_dim=width,
        decoder_value_embed_dim=2 * width,
        decoder_retention_heads=heads,
        decoder_ffn_embed_dim=F,
        decoder_layers=LAYERS,
        vocab_size=VOCAB,
        layernorm_eps=eps,
        **more,
    )
    model = (
        oracles.torchscale("architecture.retnet")
        .RetNetDecoder(args, embed_tokens=nn.Embedding(VOCAB, width))
        .double()
        .eval()
    )
    randomize(model)
    model.retnet_rel_pos.decay = log_factors(heads, device=torch.device("cpu"), dtype=torch.float64)
    if not rotated:
        model.retnet_rel_pos.angle.zero_()
    return model


def ours(oracle: nn.Module) -> Model:
    """Our decoder with the same weights; no parameter on either side is left out."""
    heads, eps = oracle.args.decoder_retention_heads, oracle.args.layernorm_eps
    position = POSITIONS[bool(oracle.retnet_rel_pos.angle.any())]
    mixer = {"type": "retention", "num_heads": heads, "position": position, "head_norm_eps": eps, "chunk_size": 4}
    config = ModelConfig.model_validate(
        {
            "hidden_size": heads * H,
            "num_layers": LAYERS,
            "norm": {"type": "rms_norm", "eps": eps},
            "blocks": {"decoder": [mixer, {"type": "mlp", "intermediate_size": F, "activation": "gelu"}]},
            "head": {"tie_word_embeddings": False},
        }
    )
    model = build_model(config, VOCAB, seed=0, dtype=torch.float64).eval()
    copied = {our_name(name): our_rows(name, p) for name, p in oracle.named_parameters()}
    mine = dict(model.named_parameters())
    assert copied.keys() == mine.keys()
    with torch.no_grad():
        for name, parameter in mine.items():
            parameter.copy_(copied[name])
    return model


def run(oracle: nn.Module, ids: Tensor, **more: Any) -> Tensor:
    with in_double():
        return oracle(ids, **more)[0]


def assert_same(oracle: nn.Module, model: Model, ids: Tensor, kernels: str, tolerance: float) -> None:
    """Logits and the gradients of all parameters."""
    model.set_runtime(kernels=kernels)
    expected, actual = run(oracle, ids), model(ids)
    assert expected.dtype == actual.dtype == torch.float64
    assert_close(actual, expected, "logits", tolerance)
    direction = torch.randn_like(expected)
    with in_double():
        (expected * direction).sum().backward()
    (actual * direction).sum().backward()
    mine = dict(model.named_parameters())
    for name, parameter in oracle.named_parameters():
        grad = mine[our_name(name)].grad
        assert grad is not None
        assert parameter.grad is not None
        assert_close(grad, our_rows(name, parameter.grad), f"gradient of {name}", tolerance)


@pytest.mark.parametrize("kernels", ["auto", "reference"])
@pytest.mark.parametrize("rotated", [True, False])
@pytest.mark.parametrize("heads", [5, 3])
def test_decoder_in_its_parallel_mode(heads: int, rotated: bool, kernels: str) -> None:
    oracle = theirs(heads, rotated=rotated)
    assert_same(oracle, ours(oracle), torch.randint(VOCAB, (2, T)), kernels, TOLERANCES[rotated])


def test_decays_of_five_heads_are_theirs_as_they_are() -> None:
    own = oracles.torchscale("architecture.retnet").RetNetRelPos(theirs(5).args).decay
    torch.testing.assert_close(log_factors(5, device=own.device, dtype=torch.float64), own.double(), rtol=3e-5, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("rotated", [True, False])
def test_decoding_is_their_recurrence(rotated: bool) -> None:
    oracle = theirs(5, rotated=rotated)
    model, ids = ours(oracle), torch.randint(VOCAB, (2, T))
    state, incremental = model.init_state(*ids.shape, dtype=torch.float64), {}
    for t in range(T):
        expected = run(oracle, ids[:, : t + 1], incremental_state=incremental)
        actual, state = model.decode(ids[:, t : t + 1], state)
        assert_close(actual, expected, f"logits at {t}", TOLERANCES[rotated])


@torch.no_grad()
@pytest.mark.parametrize("rotated", [True, False])
def test_forward_is_their_chunked_mode(rotated: bool) -> None:
    oracle = theirs(5, rotated=rotated, chunkwise_recurrent=True, recurrent_chunk_size=3)
    model, ids = ours(oracle), torch.randint(VOCAB, (2, T))
    assert_close(model(ids), run(oracle, ids), "logits", TOLERANCES[rotated])


def layers(oracle: nn.Module) -> tuple[nn.Module, Retention]:
    """The first layer of both."""
    part = ours(oracle).get_submodule("layers.0.retention.part")
    assert isinstance(part, Retention)
    return oracle.layers[0].retention, part


def row_sums(layer: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
    """Sums of their scores, without rotation: [B, N, T]."""
    q, k = (p(x).unflatten(-1, (-1, H)).transpose(1, 2) for p in (layer.q_proj, layer.k_proj))
    return (q @ k.mT * layer.scaling * mask).sum(-1)


@pytest.mark.parametrize(("scale", "eps", "above"), [(0.3, 1e-2, False), (3.0, 1e-13, True)])
def test_gradients_of_one_layer(scale: float, eps: float, above: bool) -> None:
    """With an eps that shows, where no row sum is above 1; with none to speak of, where some are."""
    oracle = theirs(5, eps, rotated=False)
    theirs_, ours_ = layers(oracle)
    x = (scale * torch.randn(2, T, 5 * H, dtype=torch.float64)).requires_grad_()
    tables = oracle.retnet_rel_pos(T)
    assert bool((row_sums(theirs_, x, tables[1]).abs() > 1).any()) == above
    with in_double():
        expected = theirs_(x, tables)
    actual = ours_(x, context(x)).y
    direction = torch.randn_like(actual)
    wanted, got = (torch.autograd.grad(y, x, direction)[0] for y in (expected, actual))
    assert_close(actual, expected, "output", 1e-12)
    assert_close(got, wanted, "gradient of x", TOLERANCES[False] if above else 1e-12)


@torch.no_grad()
def test_heads_before_their_norm() -> None:
    """The normalised scores themselves, which the norm behind them would hide."""
    oracle = theirs(5, rotated=False)
    theirs_, ours_ = layers(oracle)
    x = 3.0 * torch.randn(2, T, 5 * H, dtype=torch.float64)
    tables, seen = oracle.retnet_rel_pos(T), []
    assert (row_sums(theirs_, x, tables[1]).abs() > 1).any()
    hook = theirs_.group_norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with in_double():
        theirs_(x, tables)
    hook.remove()
    assert_close(ours_.retain(x, context(x), None)[0], seen[0], "heads", 1e-12)
