"""Prices against what is built, traced and known in closed form."""

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from graft.config.experiment import Experiment
from graft.config.load import load_experiment_from_dict
from graft.cost import known_vocab_size, price
from graft.cost.report import human_bytes, human_count
from graft.errors import ConfigError
from graft.model import Model, build_model
from graft.training.throughput import flops_per_token, forward_flops_per_token

ATTENTION: dict[str, Any] = {"type": "attention", "num_heads": 4, "position": {"type": "rope"}}
MLP: dict[str, Any] = {"type": "mlp", "intermediate_size": 96}


def experiment(*overrides: str, attention: dict[str, Any] | None = None) -> Experiment:
    data: dict[str, Any] = {
        "model": {
            "vocab_size": 300,
            "hidden_size": 32,
            "num_layers": 2,
            "norm": {"type": "rms_norm"},
            "blocks": {"b": [ATTENTION | (attention or {}), MLP]},
        },
        "objective": {"type": "causal_lm"},
        "data": {"source": {"type": "embedded"}, "tokenizer": {"type": "bytes"}, "seq_len": 24},
        "optimizer": {"type": "adamw", "learning_rate": 1e-3},
        "schedule": {"type": "constant"},
        "training": {"max_steps": 7, "global_batch_size": 4},
        "runtime": {"device": "cpu"},
    }
    return load_experiment_from_dict(data, overrides)


def built(config: Experiment) -> Model:
    return build_model(config.model, 300, seed=0)


VARIANTS = {
    "multi-head": {},
    "grouped": {"num_kv_heads": 2},
    "multi-query, free head_dim": {"num_kv_heads": 1, "head_dim": 24},
    "sliding": {"sliding_window": 5, "qk_norm": {"type": "rms_norm"}},
}


def flops_of_decoding(model: Model, length: int) -> float:
    """FLOPs per position as PyTorch counts them, token by token: each step multiplies with just the pairs it sees."""
    ids = torch.zeros(1, 1, dtype=torch.long)
    with torch.no_grad():
        state = model.init_state(1, length)
        with FlopCounterMode(display=False) as counter:
            for _ in range(length):
                _, state = model.decode(ids, state)
    return counter.get_total_flops() / length


@pytest.mark.parametrize("name", VARIANTS)
def test_flops_equal_those_traced_while_decoding(name: str) -> None:
    config = experiment(attention=VARIANTS[name])
    counted = price(config).flops_per_token
    assert counted.forward == pytest.approx(flops_of_decoding(built(config), 24), rel=1e-9)
    assert counted.backward == 2 * counted.forward
    assert counted.recomputed == 0


def test_flops_of_loops_and_padded_vocabularies() -> None:
    config = experiment("model.loops=3", "model.head.pad_vocab_to_multiple_of=64")
    assert price(config).flops_per_token.forward == pytest.approx(flops_of_decoding(built(config), 24), rel=1e-9)


def test_flops_of_an_encoder_equal_those_traced_in_one_forward() -> None:
    config = experiment("model.bidirectional=true")
    model = built(config)
    model.set_runtime(kernels="reference")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 24, dtype=torch.long))
    assert forward_flops_per_token(model, 24) == pytest.approx(counter.get_total_flops() / 24, rel=1e-9)


def test_flops_in_closed_form() -> None:
    forward = price(experiment()).flops_per_token.forward
    projections = 2 * 4 * 32 * 32
    pairs = 2 * 2 * 32 * (24 + 1) / 2
    mlp = 2 * 3 * 32 * 96
    assert forward == pytest.approx(2 * (projections + pairs + mlp) + 2 * 32 * 300)


def test_the_training_log_counts_the_same_flops() -> None:
    config = experiment("model.loops=2")
    counted = price(config).flops_per_token
    assert flops_per_token(built(config), 24) == pytest.approx(counted.forward + counted.backward)


def test_recomputation_is_priced() -> None:
    counted = price(experiment("runtime.activation_checkpointing=block")).flops_per_token
    assert counted.recomputed == counted.forward - 2 * 32 * 300


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("tied", ["true", "false"])
def test_parameters_equal_the_built_model(name: str, tied: str) -> None:
    config = experiment(f"model.head.tie_word_embeddings={tied}", "model.loops=2", attention=VARIANTS[name])
    counted = price(config).parameters
    total = sum(p.numel() for p in built(config).parameters())
    assert counted.total == counted.active == total
    assert sum(counted.per_part.values()) == sum(counted.per_role.values()) == total
    assert {"attention", "mlp", "embedding"} <= set(counted.per_part)
    assert counted.per_part["mlp"] == 2 * 3 * 32 * 96
    assert ("head" in counted.per_role) == (tied == "false")


def test_decode_state() -> None:
    # two layers of keys and values, 2 heads of 8 channels in fp32
    report = price(experiment(attention={"num_kv_heads": 2}))
    assert report.state_bytes_per_token * 24 == report.state_bytes
    assert report.state_bytes >= 24 * 2 * 2 * 2 * 8 * 4
    model = built(experiment(attention={"num_kv_heads": 2}))
    assert report.state_bytes == sum(p.state_bytes(24, torch.float32) for p in model.parts())
    half = price(experiment("precision=bf16", attention={"num_kv_heads": 2}))
    assert half.state_bytes < report.state_bytes
    window = price(experiment(attention={"num_kv_heads": 2, "sliding_window": 4}))
    assert window.state_bytes < report.state_bytes / 2
    looped = price(experiment("model.loops=3", attention={"num_kv_heads": 2}))
    assert looped.state_bytes == 3 * report.state_bytes


def test_the_run() -> None:
    report = price(experiment())
    assert (report.steps, report.tokens_per_step, report.tokens) == (7, 96, 672)
    assert report.training_flops == pytest.approx(672 * 3 * report.flops_per_token.forward)


def test_the_report_as_data_and_as_text() -> None:
    report = price(experiment("runtime.activation_checkpointing=block"))
    data = report.to_dict()
    assert data["parameters"]["total"] == report.parameters.total
    assert set(data["memory_bytes"]) >= {"weights", "gradients", "optimizer", "activations", "logits", "total"}
    assert data["flops_per_token"].keys() >= {"forward", "backward"}
    assert len(data["parts"]) == 4
    text = report.render()
    for shown in (f"{report.parameters.total:,}", human_bytes(report.memory_bytes.total), "recomputed", "672"):
        assert shown in text


def test_what_does_not_fit_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    total = price(experiment()).memory_bytes.total
    for limit, words in ((total - 1, "does not fit"), (int(total * 1.05), "barely fits")):
        monkeypatch.setattr("graft.cost.memory_limit_bytes", lambda limit=limit: limit)
        (warning,) = price(experiment()).warnings
        assert words in warning
        assert "training.micro_batch_size=2" in warning
        assert "activation_checkpointing=block" in warning
    for limit in (total * 2, None):
        monkeypatch.setattr("graft.cost.memory_limit_bytes", lambda limit=limit: limit)
        assert price(experiment()).warnings == ()


def test_the_vocabulary() -> None:
    assert price(experiment()).vocab_size == 300
    assert price(experiment("model.vocab_size=null")).vocab_size == 257
    assert price(experiment("model.vocab_size=null"), vocab_size=400).vocab_size == 400
    bpe = experiment("model.vocab_size=null", "data.tokenizer.type=bpe", "data.tokenizer.vocab_size=1000")
    assert known_vocab_size(bpe) == 1000
    with pytest.raises(ConfigError, match="'characters' tokenizer is known only once"):
        price(experiment("model.vocab_size=null", "data.tokenizer.type=characters"))


def test_human_numbers() -> None:
    assert human_count(1_234_567) == "1.235 M"
    assert human_count(12) == "12"
    assert human_bytes(1536) == "1.5 KiB"
    assert human_bytes(3 * 2**30) == "3 GiB"


def test_an_encoder_is_priced_although_its_objective_refuses_it() -> None:
    decoder, encoder = price(experiment()), price(experiment("model.bidirectional=true"))
    assert encoder.memory_bytes.total > encoder.memory_bytes.weights + encoder.memory_bytes.gradients
    assert encoder.memory_bytes.optimizer == decoder.memory_bytes.optimizer
    assert (encoder.state_bytes, {part.state_bytes for part in encoder.parts}) == (0, {0})
    assert decoder.state_bytes > 0
    pairs = 2 * 2 * 32 * (24 - (24 + 1) / 2)  # those after a query, in each of two layers
    assert encoder.flops_per_token.forward == pytest.approx(decoder.flops_per_token.forward + 2 * pairs)


def test_factorised_embeddings_and_their_convolution_are_priced() -> None:
    plain = price(experiment("runtime.activation_checkpointing=block"))
    priced = price(
        experiment(
            "model.embedding.size=8",
            "model.embedding.conv={kernel_size: 5}",
            "runtime.activation_checkpointing=block",
        )
    )
    table, projection, conv = 300 * 8, 8 * 32, 5 * 8 * 8 + 8
    assert plain.parameters.total - priced.parameters.total == 300 * 32 - table - projection - conv
    ends = 2 * (5 * 8 * 8 + projection) + 2 * (projection + table)
    assert priced.flops_per_token.forward - ends == plain.flops_per_token.forward - 2 * 300 * 32
    assert priced.flops_per_token.recomputed == plain.flops_per_token.recomputed
    assert priced.state_bytes - plain.state_bytes == 4 * (8 * 4 + 8)  # four inputs in fp32, and their documents
    assert priced.parameters.per_role["conv"] == 5 * 8 * 8
