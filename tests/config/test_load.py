"""One report for everything that is wrong, in plain words, at its place."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from graft.config.experiment import Experiment
from graft.config.load import load_experiment, load_experiment_from_dict
from graft.config.report import ConfigProblems
from graft.errors import ExitCode

Write = Callable[[str, str], str]


def set_at(data: Any, path: str, value: Any) -> None:
    *keys, last = path.split(".")
    for key in keys:
        data = data[int(key)] if isinstance(data, list) else data.setdefault(key, {})
    if value is REMOVED:
        del data[last]
    else:
        data[int(last) if isinstance(data, list) else last] = value


REMOVED = object()


def report(data: dict[str, Any]) -> list[str]:
    with pytest.raises(ConfigProblems) as caught:
        load_experiment_from_dict(data)
    return [str(p).removeprefix("config  ") for p in caught.value.problems]


def test_a_valid_file_loads(write: Write, small_yaml: str, small: dict[str, Any]) -> None:
    experiment = load_experiment(write("small.yaml", small_yaml))
    assert experiment == load_experiment_from_dict(small) == Experiment.model_validate(small)
    assert experiment.model.num_layers == 4


def test_all_problems_are_in_one_report_in_the_order_of_the_file(write: Write, problems: Any) -> None:
    write(
        "wrong.yaml",
        """\
name: demo
model:
  hidden_size: 64
  num_layers: 3
  norm: {type: rms_norm, epss: 1e-5}
  blocks:
    b:
      - {type: attention, n_heads: 4, num_kv_heads: 3, position: {type: rope, theta: 1e4}}
      - {type: mlp, intermediate_size: 128, activation: sliu}
  layout: [b, b]
objective: {type: causal_lm}
optimizer: {type: adamw, learning_rate: "1e-3"}
schedule: {type: cosine, warmup_steps: 200}
training: {max_steps: 100, global_batch_size: 8}
data: {source: {type: embedded}, tokenizer: {type: byte}, seq_len: 64}
runtime: {compile: yes}
""",
    )
    assert problems("wrong.yaml") == [
        "wrong.yaml:5:26  model.norm.epss: unknown key; did you mean 'eps'?",
        "wrong.yaml:8:27  model.blocks.b.0.n_heads: unknown key; did you mean 'num_heads'?",
        "wrong.yaml:8:53  model.blocks.b.0.num_kv_heads: num_heads 4 is no multiple of num_kv_heads 3; "
        "choose a divisor of num_heads",
        "wrong.yaml:9:57  model.blocks.b.1.activation: must be one of silu, gelu, gelu_tanh, relu, relu2, "
        "not 'sliu'; did you mean 'silu'?",
        "wrong.yaml:10:3  model.layout: a layout of 2 layers does not repeat to num_layers = 3 exactly; "
        "change one so that it divides the other",
        "wrong.yaml:12:41  optimizer.learning_rate: must be a number, not '1e-3'; remove the quotes",
        "wrong.yaml:13:40  schedule.warmup_steps: warm-up of 200 steps exceeds max_steps 100; shorten the warm-up",
        "wrong.yaml:15:52  data.tokenizer.type: 'byte' is no known type; did you mean 'bytes'? "
        "(one of bpe, bytes, characters, file)",
        "wrong.yaml:16:20  runtime.compile: must be true or false, not 'yes'; write true (YAML 1.2 reads yes as text)",
    ]


def test_the_report_counts_its_lines_and_exits_with_2(write: Write, small_yaml: str) -> None:
    with pytest.raises(ConfigProblems) as one:
        load_experiment(write("small.yaml", small_yaml + "sede: 3\n"))
    assert str(one.value) == "small.yaml:15:1  sede: unknown key; did you mean 'seed'?"
    with pytest.raises(ConfigProblems) as two:
        load_experiment(write("small.yaml", small_yaml + "sede: 3\nprecision: 16\n"))
    assert str(two.value).startswith("2 problems in the config\nsmall.yaml:15:1")
    assert two.value.exit_code == ExitCode.CONFIG
    assert two.value.to_json()[1] == {
        "file": "small.yaml",
        "line": 16,
        "col": 12,
        "path": "precision",
        "problem": "must be one of fp32, bf16, fp16, not 16",
        "fix": None,
    }


CASES: list[tuple[dict[str, Any], list[str]]] = [
    ({"seed": True}, ["seed: must be a whole number, not true"]),
    ({"seed": 1.5}, ["seed: must be a whole number, not 1.5"]),
    ({"training.max_steps": 1e3}, ["training.max_steps: must be a whole number, not 1000; write 1000"]),
    ({"training.max_steps": 1e300}, ["training.max_steps: must be a whole number, not 1e+300"]),
    ({"optimizer.learning_rate": "nan"}, ["optimizer.learning_rate: must be a number, not 'nan'"]),
    (
        {"data.tokenizer": {"type": "bytes", "vocab_size:300": None, "vocab": 1}},
        [
            "data.tokenizer.vocab: unknown key; remove it",
            "data.tokenizer.vocab_size:300: unknown key; write 'vocab_size: 300', with a blank after the colon",
        ],
    ),
    ({"runtime.device": "tpu"}, ["runtime.device: 'tpu' is not allowed; auto | cpu | cuda | cuda:N | mps"]),
    ({"runtime.device": "cuda:"}, ["runtime.device: 'cuda:' is not allowed; auto | cpu | cuda | cuda:N | mps"]),
    (
        {"data.source": {"type": "files", "path": ["a.txt", "*.md.zst"], "text_field": "body"}},
        ["data.source.text_field: text_field does nothing for text files; remove it"],
    ),
    (
        {"data.source": {"type": "files", "path": ["a.jsonl", "b.parquet"], "document": "line"}},
        ["data.source.document: document does nothing for jsonl and parquet: a row is a document; remove it"],
    ),
    ({"seed": None}, ["seed: must be a whole number, not null; remove the line to get the default"]),
    (  # a key named like the table's type: the type in an error's location is not that key
        {"model.norm": {"type": "dyt", "dyt": {}, "alpha_init": "x"}},
        ["model.norm.alpha_init: must be a number, not 'x'", "model.norm.dyt: unknown key; keys here: alpha_init"],
    ),
    ({"data.seq_len": None}, ["data.seq_len: must be a whole number, not null"]),
    ({"seed": 2**31}, [f"seed: must be less than {2**31}, not {2**31}"]),
    ({"name": "a b"}, ["name: 'a b' is not allowed; first part of the run's id; letters, digits, '.', '_' and '-'"]),
    ({"training.max_grad_norm": float("nan")}, ["training.max_grad_norm: must be a finite number, not nan"]),
    ({"optimizer.learning_rate": float("inf")}, ["optimizer.learning_rate: must be a finite number, not inf"]),
    ({"model.norm": "dyt"}, ["model.norm: must be a table, not 'dyt'; write {type: dyt}"]),
    ({"model.norm": 3}, ["model.norm: must be a table, not 3"]),
    ({"model.head": []}, ["model.head: must be a table, not a list"]),
    ({"model.blocks": {}}, ["model.blocks: must have at least 1 entries, not 0"]),
    ({"model.blocks.b": {"type": "mlp"}}, ["model.blocks.b: must be a list, not a table"]),
    (
        {"model.norm": {"eps": 1e-5}},
        ["model.norm: the table has no type; add type: one of derf, dyt, layer_norm, rms_norm"],
    ),
    (
        {"model.embedding.scale": "sqrt"},
        ["model.embedding.scale: must be one of none, sqrt_hidden_size or a number, not 'sqrt'"],
    ),
    ({"model.layout": ["b", 3]}, ["model.layout.1: must be text or a table, not 3"]),
    ({"model.layout": [{"block": "b", "repeat": 0}]}, ["model.layout.0.repeat: must be at least 1, not 0"]),
    ({"optimizer.betas": [0.9]}, ["optimizer.betas: must have more than 1 entries"]),
    ({"optimizer.betas": [0.9, 0.9, 0.9]}, ["optimizer.betas: must have at most 2 entries, not 3"]),
    (
        {"optimizer.groups": {"embeding": {}}},
        [r"optimizer.groups.embeding: 'embeding' is no known key; did you mean 'embedding'\?.*"],
    ),
    ({"training.learning_rate": 1}, ["training.learning_rate: unknown key; 'learning_rate' belongs to optimizer"]),
    ({"zzz": 1}, ["zzz: unknown key; keys here: name, model, .*"]),
    ({"data": REMOVED}, ["data: is required; add data: text, tokens and rows"]),
    ({"data.seq_len": REMOVED, "data.seqlen": 8}, ["data.seqlen: unknown key; did you mean 'seq_len'\\?"]),
    (
        {"model.blocks.b.0.position": {"type": "rope", "scaling": {"type": "yarn"}}},
        [
            "model.blocks.b.0.position.scaling.factor: is required; add factor: how many times longer than trained",
            "model.blocks.b.0.position.scaling.original_max_seq_len: is required; add original_max_seq_len: .*",
        ],
    ),
    (
        {"plugins": ["no.such.module"]},
        ["plugins.0: the plug-in 'no.such.module' cannot be imported: ModuleNotFoundE.*"],
    ),
    ({"plugins": "a"}, ["plugins: must be a list, not 'a'"]),
    ({"plugins": [3]}, ["plugins.0: must be text, not 3"]),
]


@pytest.mark.parametrize(("changes", "expected"), CASES, ids=[next(iter(c[0])) for c in CASES])
def test_each_mistake_has_its_words(small: dict[str, Any], changes: dict[str, Any], expected: list[str]) -> None:
    for path, value in changes.items():
        set_at(small, path, value)
    found = report(small)
    assert len(found) == len(expected), found
    for line, pattern in zip(found, expected, strict=True):
        assert line == pattern or re.fullmatch(pattern, line), line


PHYSICS: list[tuple[dict[str, Any], str]] = [
    ({"model.hidden_size": 17}, "model.blocks.b.0.num_heads: num_heads 2 does not divide hidden_size 17; set head_dim"),
    ({"model.blocks.b.0.head_dim": 3}, "model.blocks.b.0.position.partial_rotary_factor: 3 of head_dim 3 channels"),
    (
        {"model.blocks.b.0.num_kv_heads": 3},
        "model.blocks.b.0.num_kv_heads: num_heads 2 is no multiple of num_kv_heads 3",
    ),
    ({"model.layout": ["b", "b", "b"]}, "model.layout: a layout of 3 layers does not repeat to num_layers = 4"),
    ({"model.layout": ["c"]}, "model.layout.0: 'c' is no block"),
    ({"model.blocks.c": [{"type": "mlp", "intermediate_size": 1}]}, "model.layout: there are 2 blocks and no layout"),
    ({"schedule.warmup_steps": 11}, "schedule.warmup_steps: warm-up of 11 steps exceeds max_steps 10"),
    ({"schedule.warmup_fraction": 0.1}, "schedule.warmup_fraction: warmup_steps and warmup_fraction are given"),
    ({"training.max_tokens": 100}, "training.max_steps: both of max_steps and max_tokens given"),
    ({"training.max_steps": None}, "training.max_steps: neither of max_steps and max_tokens given"),
    (
        {"training.max_steps": None, "training.max_tokens": 5},
        "training.max_tokens: max_tokens 5 is less than one step of 32",
    ),
    (
        {"training.micro_batch_size": 3},
        "training.micro_batch_size: global_batch_size 4 is no multiple of micro_batch_size 3",
    ),
    (
        {"model.blocks.b.0.position": {"type": "learned", "max_seq_len": 9}},
        "model.blocks.b.0.position: learned acts on embed",
    ),
    (
        {"model.embedding.position": {"type": "learned", "max_seq_len": 7}},
        "data.seq_len: seq_len 8 exceeds the 7 learned",
    ),
    ({"model.embedding.position": {"type": "rope"}}, "model.embedding.position: rope acts inside attention"),
    ({"schedule.min_lr_ratio": 2.0}, "schedule.min_lr_ratio: must be at most 1, not 2"),
]


@pytest.mark.parametrize(("changes", "expected"), PHYSICS, ids=[next(iter(c[0])) for c in PHYSICS])
def test_cross_field_physics(small: dict[str, Any], changes: dict[str, Any], expected: str) -> None:
    for path, value in changes.items():
        set_at(small, path, value)
    found = report(small)
    assert [line.startswith(expected) for line in found] == [True], found


def test_physics_is_reported_beside_mistakes_elsewhere(small: dict[str, Any]) -> None:
    set_at(small, "schedule.warmup_steps", 11)  # needs the whole config
    set_at(small, "model.layout", ["b", "b", "b"])  # needs the whole model
    set_at(small, "model.norm.epss", 1)
    set_at(small, "runtime.compile", "yes")
    paths = [line.split(":")[0] for line in report(small)]
    assert sorted(paths) == ["model.layout", "model.norm.epss", "runtime.compile", "schedule.warmup_steps"]


def test_physics_of_sections_is_reported_when_the_whole_cannot_be_read(small: dict[str, Any]) -> None:
    set_at(small, "objective.type", "cusal_lm")
    set_at(small, "training.micro_batch_size", 3)
    assert [line.split(":")[0] for line in report(small)] == ["objective.type", "training.micro_batch_size"]


def test_a_repaired_field_is_not_blamed_twice(small: dict[str, Any]) -> None:
    set_at(small, "training.max_steps", "ten")  # without it, "neither of max_steps and max_tokens" would follow
    assert report(small) == ["training.max_steps: must be a whole number, not 'ten'"]


def test_missing_values_point_at_the_enclosing_table(write: Write, small_yaml: str, problems: Any) -> None:
    text = small_yaml.replace("num_heads: 2, ", "").replace("max_steps: 10, ", "")
    assert [line.split("  ")[0] for line in problems(write("s.yaml", text))] == ["s.yaml:8:9", "s.yaml:14:1"]


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.floats() | st.sampled_from(["b", "yes", "rope", "", "model"]),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["type", "b", "eps", "0"]), inner, max_size=2)
    ),
    max_leaves=4,
)
PATHS = st.sampled_from(
    """model model.norm model.norm.type model.blocks model.blocks.b model.blocks.b.0 model.blocks.b.0.position
    model.layout model.overrides model.embedding model.embedding.scale data data.source data.source.type optimizer
    optimizer.groups optimizer.betas schedule training training.guard name seed plugins precision logging.wandb
    unknown""".split()  # noqa: SIM905 (a page of quotes says no more)
)


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(PATHS, ANYTHING, min_size=1, max_size=3))
def test_whatever_is_written_there_is_no_traceback(small: dict[str, Any], changes: dict[str, Any]) -> None:
    import copy

    data = copy.deepcopy(small)
    for path, value in changes.items():
        if value == ["model"] and path == "plugins":
            continue
        try:
            set_at(data, path, value)
        except (TypeError, AttributeError, IndexError, ValueError, KeyError):
            continue  # an earlier change removed the way there
    try:
        load_experiment_from_dict(data)
    except ConfigProblems as error:
        for problem in error.problems:
            assert problem.problem
            assert "Input should" not in str(problem)
            assert "function-after" not in str(problem)
