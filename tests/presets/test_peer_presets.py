"""The presets of experts by product keys over latent attention: sizes, and a few steps that learn."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from graft import api
from graft.config.advice import warnings
from graft.config.experiment import Experiment
from graft.config.load import load_experiment
from graft.cost.counts import part_costs
from graft.model import build_model

MODELS = Path(__file__).parents[2] / "presets" / "models"
SIZES = {"peer_mla_dry": (281_698, 167_010), "peer_mla_small": (28_521_024, 3_453_504)}


def load(name: str, *overrides: str) -> Experiment:
    return load_experiment(MODELS / f"{name}.yaml", list(overrides))


@pytest.mark.parametrize("name", SIZES)
def test_sizes(name: str) -> None:
    experiment, (total, active) = load(name), SIZES[name]
    assert experiment.model.vocab_size is not None
    model = build_model(experiment.model, experiment.model.vocab_size, seed=0, device="meta")
    idle = sum(part.parameters - part.active_parameters for part in part_costs(model, 1, model.head_weight().dtype))
    assert (model.num_parameters(), model.num_parameters() - idle) == (total, active)
    text = (MODELS / f"{name}.yaml").read_text()
    assert f"{total:,} parameters, {active:,} of them" in text
    assert not warnings(experiment)


def test_the_dry_run_is_the_one_it_stands_for() -> None:
    model = load("peer_mla_dry").model
    assert (model.hidden_size, model.num_layers) == (128, 2)
    (mla, mlp), (other, peer) = model.layers()
    assert mla == other
    assert (mla.q_lora_rank, mla.kv_lora_rank, mla.qk_rope_head_dim, mla.v_head_dim) == (32, 16, 16, 16)
    assert (mla.num_heads, mla.qk_nope_head_dim, mlp.intermediate_size, mlp.gated) == (4, 8, 256, False)
    assert (peer.product_key_dims, peer.num_experts_per_tok, peer.num_heads) == ((8, 8), 4, 2)
    assert (peer.expert_hidden_size, peer.query_dim, peer.query_norm) == (8, 32, "none")


@pytest.mark.slow
@pytest.mark.parametrize("name", SIZES)
def test_a_few_steps_learn(name: str, tmp_path: Path) -> None:
    small = ("training.max_steps=30", "data.seq_len=64", "evaluation.interval=30", "evaluation.max_sequences=8")
    where = (f"runtime.output_dir={tmp_path}/runs", f"runtime.cache_dir={tmp_path}/cache", "runtime.compile=false")
    quick = () if name.endswith("small") else ("optimizer.learning_rate=3e-3",)
    run = api.train(load(name, *small, *where, *quick, "schedule={type: constant}"), stream=io.StringIO())
    assert run.score is not None
    assert run.score < {"peer_mla_dry": 3.5, "peer_mla_small": 6.5}[name]  # ln 257 = 5.5, ln 2048 = 7.6
