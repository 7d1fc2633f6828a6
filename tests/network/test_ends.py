"""Embedding and head."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from graft.config.model import ModelConfig
from graft.initialization import initialize
from graft.network.ends import Head, TokenEmbedding, padded_rows
from graft.part import parameter_roles

D, V = 16, 11


def config(**model: Any) -> ModelConfig:
    parts = [{"type": "mlp", "intermediate_size": 5}]
    base = {"hidden_size": D, "num_layers": 1, "norm": {"type": "rms_norm"}, "blocks": {"only": parts}}
    return ModelConfig.model_validate({**base, **model})


def embedding(**fields: Any) -> TokenEmbedding:
    module = TokenEmbedding(config(embedding=fields), V)
    initialize(module, 0)
    return module


IDS, POSITIONS = torch.tensor([[3, 3, 0], [10, 1, 3]]), torch.tensor([[0, 1, 2], [0, 0, 1]])


@pytest.mark.parametrize(("scale", "factor"), [("none", 1.0), ("sqrt_hidden_size", 4.0), (0.25, 0.25)])
def test_scale(scale: str | float, factor: float) -> None:
    module = embedding(scale=scale)
    torch.testing.assert_close(module(IDS, POSITIONS)[0], module.weight[IDS] * factor)


def test_positions_then_norm() -> None:
    module = embedding(scale=3.0, position={"type": "learned", "max_seq_len": 5}, norm={"type": "layer_norm"})
    expected = module.norm(3.0 * module.weight[IDS] + module.position.weight[POSITIONS])
    torch.testing.assert_close(module(IDS, POSITIONS)[0], expected)
    assert parameter_roles(module)["position.weight"] == "embedding"


def test_no_position_adds_nothing() -> None:
    module = embedding(position={"type": "none"})
    assert torch.equal(module(IDS, POSITIONS)[0], embedding()(IDS, POSITIONS)[0])


def test_dropout_acts_in_training_only() -> None:
    module = embedding(dropout=0.5)
    assert (module(IDS, POSITIONS)[0] == 0).any()
    assert not (module.eval()(IDS, POSITIONS)[0] == 0).any()


def test_embedding_std() -> None:
    wide = TokenEmbedding(config(init={"std": 0.02, "embedding_std": 0.5}), 400)
    initialize(wide, 0)
    assert abs(wide.weight.std().item() - 0.5) < 0.02


def head(**fields: Any) -> Head:
    module = Head(config(head=fields), V, padded_rows(V, fields.get("pad_vocab_to_multiple_of", 1)))
    initialize(module, 0)
    return module


def test_head_formula_and_padding() -> None:
    module = head(bias=True, logit_softcap=2.0, pad_vocab_to_multiple_of=8)
    table = torch.randn(16, D, requires_grad=True)
    with torch.no_grad():
        module.bias.normal_()
    x = torch.randn(2, 3, D)
    logits = module(x, table)
    assert logits.shape == (2, 3, V)
    torch.testing.assert_close(logits, 2.0 * torch.tanh((x @ table.T + module.bias)[..., :V] / 2.0))
    logits.square().sum().backward()
    for grad in (table.grad, module.bias.grad):
        assert grad[:V].any()
        assert not grad[V:].any()


def test_own_matrix_only_when_untied() -> None:
    assert parameter_roles(head()) == {}
    assert parameter_roles(head(tie_word_embeddings=False, bias=True)) == {"weight": "head", "bias": "bias"}


def test_logits_are_fp32() -> None:
    x, table = torch.randn(1, 2, D), torch.randn(V, D)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert head()(x, table).dtype == torch.float32
    assert head()(x.double(), table.double()).dtype == torch.float64


@pytest.mark.parametrize(("vocab", "multiple", "rows"), [(10, 1, 10), (10, 64, 64), (64, 64, 64), (65, 64, 128)])
def test_padded_rows(vocab: int, multiple: int, rows: int) -> None:
    assert padded_rows(vocab, multiple) == rows
