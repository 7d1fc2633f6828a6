"""Identity of a run, the resolved config, and differences."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from graft.config.experiment import SEMANTIC_FIELDS, Experiment
from graft.config.identity import config_diff, resolved_yaml, run_id, semantic_hash
from graft.config.load import load_experiment, load_experiment_from_dict

Write = Callable[[str, str], str]


def hashed(data: dict[str, Any], *overrides: str) -> str:
    return semantic_hash(load_experiment_from_dict(data, overrides))


@pytest.mark.parametrize(
    "override",
    [
        "name=other",
        "runtime.device=cpu",
        "runtime.compile=true",
        "runtime.output_dir=/elsewhere",
        "logging.interval=1",
        "evaluation.interval=5",
        "checkpoint.keep_last=7",
        "model.norm.eps=1.0e-6",
        "model.blocks.b.1.gated=true",
        "model.blocks.b.0.position.theta=10000",
    ],
)
def test_what_does_not_change_the_numbers_keeps_the_hash(small: dict[str, Any], override: str) -> None:
    assert hashed(small, override) == hashed(small)


@pytest.mark.parametrize(
    "override",
    [
        "seed=1",
        "model.norm.eps=1e-5",
        "model.num_layers=2",
        "model.overrides.0.attention.sliding_window=4",
        "precision=bf16",
        "training.global_batch_size=8",
        "data.seq_len=16",
        "optimizer.weight_decay=0",
        "schedule.warmup_steps=3",
        "objective.z_loss_coef=1e-4",
    ],
)
def test_what_changes_the_numbers_changes_the_hash(small: dict[str, Any], override: str) -> None:
    assert hashed(small, override) != hashed(small)


def test_every_field_is_either_semantic_or_not_on_purpose() -> None:
    other = {"name", "evaluation", "checkpoint", "logging", "runtime", "plugins"}
    assert set(SEMANTIC_FIELDS) | other == set(Experiment.model_fields)
    assert not set(SEMANTIC_FIELDS) & other


def test_the_hash_does_not_depend_on_the_process() -> None:
    data = {
        "model": {"hidden_size": 4, "num_layers": 1, "norm": {"type": "dyt"}},
        "objective": {"type": "causal_lm"},
        "data": {"source": {"type": "embedded"}, "tokenizer": {"type": "bytes"}, "seq_len": 8},
        "optimizer": {"type": "adamw", "learning_rate": 1},
        "schedule": {"type": "constant"},
        "training": {"max_steps": 1, "global_batch_size": 1},
    }
    data["model"]["blocks"] = {"b": [{"type": "mlp", "intermediate_size": 4}]}
    text = json.dumps(load_experiment_from_dict(data).to_dict())
    assert len(semantic_hash(load_experiment_from_dict(json.loads(text)))) == 32
    assert hashed(data) == hashed(json.loads(text))


def test_the_id_is_the_name_and_eight_digits(small: dict[str, Any]) -> None:
    experiment = load_experiment_from_dict(small)
    assert run_id(experiment) == f"small-{semantic_hash(experiment)[:8]}"


def reversed_keys(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: reversed_keys(value[key]) for key in reversed(value)}
    return [reversed_keys(v) for v in value] if isinstance(value, list) else value


def test_key_order_and_file_format_do_not_matter(write: Write, small: dict[str, Any], small_yaml: str) -> None:
    toml = """
seed = 0
[model]
hidden_size = 16
num_layers = 4
norm = {type = "rms_norm", eps = 1e-6}
[[model.blocks.b]]
type = "attention"
num_heads = 2
position = {type = "rope", theta = 1e4}
[[model.blocks.b]]
type = "mlp"
intermediate_size = 32
[objective]
type = "causal_lm"
[data]
seq_len = 8
source.type = "embedded"
tokenizer.type = "bytes"
[optimizer]
type = "adamw"
learning_rate = 1e-3
[schedule]
type = "cosine"
warmup_steps = 2
[training]
max_steps = 10
global_batch_size = 4
"""
    files = [
        write("a.yaml", small_yaml),
        write("a.json", json.dumps(reversed_keys(small))),
        write("a.toml", toml),
    ]
    assert len({semantic_hash(load_experiment(name)) for name in files}) == 1


def test_overlapping_layer_overrides_depend_on_their_order_only_where_it_matters(small: dict[str, Any]) -> None:
    def with_overrides(overrides: dict[str, Any]) -> str:
        data = copy.deepcopy(small)
        data["model"]["overrides"] = overrides
        return hashed(data)

    first, second = {"0-3": {"mlp.intermediate_size": 8}}, {"1": {"mlp.intermediate_size": 4}}
    assert with_overrides(first | second) != with_overrides(second | first)
    apart = {"0": {"mlp.intermediate_size": 8}}
    assert with_overrides(apart | second) == with_overrides(second | apart)
    assert with_overrides(second) == with_overrides({"1": {"mlp": {"intermediate_size": 4}}})


def experiments() -> st.SearchStrategy[dict[str, Any]]:
    """Changes to the small config that keep it valid."""
    text = st.text(st.characters(blacklist_categories=["Cs", "Cc"]), min_size=1, max_size=12)
    norm = st.one_of(
        st.fixed_dictionaries(
            {"type": st.just("rms_norm"), "eps": st.floats(1e-12, 1.0), "unit_offset": st.booleans()}
        ),
        st.fixed_dictionaries({"type": st.just("derf"), "shift_init": st.floats(-10, 10)}),
    )
    return st.fixed_dictionaries(
        {},
        optional={
            "seed": st.integers(0, 2**31 - 1),
            "precision": st.sampled_from(["fp32", "bf16", "fp16"]),
            "model.norm": norm,
            "model.residual_scale": st.floats(-2, 2),
            "model.embedding": st.fixed_dictionaries({"scale": st.sampled_from(["none", "sqrt_hidden_size", 2, 0.5])}),
            "model.overrides": st.dictionaries(
                st.sampled_from(["0", "-1", "1-2"]), st.just({"mlp.bias": True, "attention": {"sliding_window": 3}})
            ),
            "runtime": st.fixed_dictionaries({"output_dir": text, "threads": st.none() | st.integers(1, 64)}),
            "logging": st.fixed_dictionaries({"wandb": st.none() | st.fixed_dictionaries({"tags": st.lists(text)})}),
            "optimizer.groups": st.dictionaries(
                st.sampled_from(["embedding", "norm", "head"]),
                st.fixed_dictionaries({"lr_multiplier": st.floats(0, 9)}),
            ),
        },
    )


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(experiments())
def test_the_resolved_config_loads_back_to_the_same(
    write: Write, small: dict[str, Any], changes: dict[str, Any]
) -> None:
    data = copy.deepcopy(small)
    for path, value in changes.items():
        table = data
        *keys, last = path.split(".")
        for key in keys:
            table = table[key]
        table[last] = value
    experiment = load_experiment_from_dict(data)
    again = load_experiment(write("resolved.yaml", resolved_yaml(experiment)))
    assert again == experiment
    assert hash(again) == hash(experiment)
    assert semantic_hash(again) == semantic_hash(experiment)
    assert config_diff(experiment, again) == []


def test_the_resolved_config_spells_everything_out(small: dict[str, Any]) -> None:
    lines = resolved_yaml(load_experiment_from_dict(small)).splitlines()
    assert "  vocab_size: null" in lines
    assert "  cache_dir: .graft_cache" in lines
    assert lines[0].startswith("# small-")
    assert "    type: rms_norm" in lines[lines.index("  norm:") + 1]


def test_differences_name_paths_and_both_values(small: dict[str, Any]) -> None:
    a = load_experiment_from_dict(small)
    b = load_experiment_from_dict(small, ["model.blocks.b.1.activation=relu2", "seed=4", "model.layout=[b, b]"])
    assert config_diff(a, b) == [
        ("model.blocks.b.1.activation", "silu", "relu2"),
        ("model.layout", None, ["b", "b"]),
        ("seed", 0, 4),
    ]
    assert config_diff(a, a) == []
    other = load_experiment_from_dict(small, ["model.norm.type=dyt"])
    assert ("model.norm.eps", 1e-6, "(absent)") in config_diff(a, other)
