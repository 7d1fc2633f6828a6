"""Next-token prediction: the loss by hand, sums over micro-batches, what is reported."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from graft.config.model import ModelConfig
from graft.data.batch import Batch
from graft.errors import ConfigError
from graft.model import Features, Model, build_model
from graft.objectives.base import aux_total
from graft.objectives.causal_lm import CausalLM
from graft.objectives.causal_lm_config import CausalLMConfig

V = 23


def model(**fields: Any) -> Model:
    parts = [
        {"type": "attention", "num_heads": 2, "position": {"type": "rope"}},
        {"type": "mlp", "intermediate_size": 12},
    ]
    base = {"hidden_size": 8, "num_layers": 2, "norm": {"type": "rms_norm"}, "blocks": {"decoder": parts}}
    config = ModelConfig.model_validate({**base, "init": {"std": 0.4}, **fields})
    return build_model(config, V, seed=0, dtype=torch.float64)


def batch(rows: slice = slice(None)) -> Batch:
    """Four packed rows with very uneven numbers of targets."""
    generator = torch.Generator().manual_seed(1)
    ids, targets = (torch.randint(V, (4, 9), generator=generator) for _ in range(2))
    for row, ignored in enumerate([0, 8, 4, 9]):
        targets[row, :ignored] = -100
    segments = torch.tensor([[1] * 4 + [2] * 5] * 4)
    count = int((targets[rows] != -100).sum())
    return Batch(ids[rows], targets[rows], segments[rows], None, count, count, tuple(range(4))[rows])


def objective(coef: float = 0.0) -> CausalLM:
    return CausalLMConfig(z_loss_coef=coef).build()


@pytest.mark.parametrize(
    "head", [{}, {"tie_word_embeddings": False, "bias": True, "logit_softcap": 3.0, "pad_vocab_to_multiple_of": 16}]
)
def test_loss_by_hand(head: dict[str, Any]) -> None:
    network, data = model(head=head), batch()
    with torch.no_grad():
        for parameter in network.parameters():  # a bias starts at zero, where it would not show
            parameter.add_(0.3 * torch.randn_like(parameter))
    terms = objective(0.1).loss(network, data)
    logits = network(data.input_ids_BT, segment_ids_BT=data.segment_ids_BT).flatten(0, 1)
    targets = data.targets_BT.flatten()
    ce = F.cross_entropy(logits, targets, reduction="sum")
    z = logits.logsumexp(-1)[targets != -100].square().sum()
    torch.testing.assert_close(terms.main, ce + 0.1 * z)
    torch.testing.assert_close(dict(terms.metrics), {"ce": ce.detach(), "z_loss": z.detach()})
    assert terms.aux.item() == 0.0


def gradients(network: Model, parts: list[Batch]) -> tuple[float, dict[str, torch.Tensor]]:
    network.zero_grad()
    total = sum(part.num_targets for part in parts)
    loss = 0.0
    for part in parts:
        term = objective(0.05).loss(network, part).main / total
        term.backward()
        loss += term.item()
    return loss, {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("chunk_bytes", [2**28, 4 * V * 5])
def test_one_micro_batch_is_four(chunk_bytes: int) -> None:
    network = model()
    network.set_runtime(loss_chunk_bytes=chunk_bytes)
    whole = gradients(network, [batch()])
    parts = gradients(network, [batch(slice(i, i + 1)) for i in range(4)])
    assert parts[0] == pytest.approx(whole[0], rel=1e-14)
    torch.testing.assert_close(parts[1], whole[1], rtol=1e-12, atol=1e-14)


def test_the_z_loss_is_never_in_ce() -> None:
    network, data = model(), batch()
    plain, with_z = objective().loss(network, data), objective(10.0).loss(network, data)
    assert torch.equal(plain.metrics["ce"], with_z.metrics["ce"])
    assert torch.equal(plain.main.detach(), plain.metrics["ce"])
    torch.testing.assert_close(with_z.main.detach(), plain.main.detach() + 10.0 * with_z.metrics["z_loss"])


def test_metrics_are_detached() -> None:
    terms = objective(0.1).loss(model(), batch())
    assert terms.main.requires_grad
    assert not any(value.requires_grad for value in terms.metrics.values())


def test_kernels_choice_reaches_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    import graft.ops.cross_entropy as ops

    network, calls = model(), []
    original = ops.reference_linear_cross_entropy
    monkeypatch.setattr(ops, "reference_linear_cross_entropy", lambda *args: calls.append(1) or original(*args))
    fused = objective(0.1).loss(network, batch()).main
    assert not calls
    network.set_runtime(kernels="reference")
    torch.testing.assert_close(objective(0.1).loss(network, batch()).main, fused)
    assert calls


def test_auxiliary_sums_are_added_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    network, data = model(), batch()
    plain = objective().loss(network, data)
    original = network.features

    def with_aux(*args: Any, **kwargs: Any) -> Features:
        features = original(*args, **kwargs)
        return features._replace(aux={"a": features.x_BTD.sum() * 0 + 2.0, "b": torch.tensor(3.0)})

    monkeypatch.setattr(network, "features", with_aux)
    terms = objective().loss(network, data)
    assert terms.aux.item() == 5.0
    assert terms.aux.requires_grad
    assert torch.equal(terms.main, plain.main)


def test_aux_total_of_nothing_is_zero() -> None:
    assert aux_total({}, torch.tensor(7.0)).item() == 0.0


def test_an_encoder_is_an_error() -> None:
    with pytest.raises(ConfigError, match="bidirectional"):
        objective().loss(model(bidirectional=True), batch())
