"""Variants of a person's own: registered by a package named in ``plugins``, after the schema was already built."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest

from graft.config.base import knob
from graft.config.experiment import Experiment
from graft.config.families import ChannelMixerConfig, NormConfig
from graft.config.load import load_experiment, load_experiment_from_dict
from graft.config.registry import PACKAGES, register, variants
from graft.config.report import ConfigProblems
from graft.errors import ConfigError

Write = Callable[[str, str], str]

PLUGIN = '''
from typing import Literal

from graft.config.base import knob
from graft.config.families import NormConfig, TokenMixerConfig


class ScaleConfig(NormConfig):
    """Only a factor."""

    implementation = "own_parts:Scale"
    type: Literal["own_scale"] = knob("own_scale", "tag")
    factor: float = knob(2.0, "the factor", gt=0.0)


class ShiftConfig(TokenMixerConfig):
    """The previous token."""

    supports_bidirectional = False
    implementation = "own_parts:Shift"
    type: Literal["own_shift"] = knob("own_shift", "tag")
    distance: int = knob(1, "how far back", ge=1)


class Scale:
    def __init__(self, config, size):
        self.config, self.size = config, size
'''

CONFIG = """\
plugins: [own_parts]
model:
  hidden_size: 16
  num_layers: 2
  norm: {type: own_scale, factor: 3}
  blocks:
    b:
      - {type: own_shift, distance: 2, norm: {type: rms_norm}}
      - {type: mlp, intermediate_size: 32}
  overrides: {1: {own_shift.distance: 3}}
objective: {type: causal_lm}
data: {source: {type: embedded}, tokenizer: {type: bytes}, seq_len: 8}
optimizer: {type: adamw, learning_rate: 1e-3}
schedule: {type: constant}
training: {max_steps: 10, global_batch_size: 4}
"""


@pytest.fixture
def _own_parts(monkeypatch: pytest.MonkeyPatch, registry_restored: None) -> Iterator[None]:
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    sys.modules.pop("own_parts", None)


@pytest.mark.usefixtures("_own_parts")
def test_a_plugin_beside_the_config_is_used(write: Write, small: dict[str, Any], tmp_path: Path) -> None:
    Experiment.model_validate(small)  # the schema exists before the plug-in does
    write("project/own_parts.py", PLUGIN)
    experiment = load_experiment(write("project/config.yaml", CONFIG))
    assert experiment.model.norm.to_dict() == {"type": "own_scale", "factor": 3.0}
    assert [layer[0].to_dict()["distance"] for layer in experiment.model.layers()] == [2, 3]
    built = experiment.model.norm.build(5)
    assert (type(built).__name__, built.size, built.config) == ("Scale", 5, experiment.model.norm)
    assert sys.path[-2:] == [str(tmp_path / "project"), str(tmp_path)]  # last: they shadow nothing
    assert "own_shift" in variants("part")
    assert Experiment.model_validate(experiment.to_dict()) == experiment


@pytest.mark.usefixtures("_own_parts")
def test_mistakes_in_a_plugins_part_are_reported_like_any(write: Write, problems: Any) -> None:
    write("own_parts.py", PLUGIN)
    text = CONFIG.replace("distance: 2", "distanc: 2").replace("factor: 3", "factor: -3")
    text = text.replace("  num_layers: 2\n", "  num_layers: 2\n  bidirectional: true\n")
    assert problems(write("config.yaml", text)) == [
        "config.yaml:6:35  model.norm.factor: must be greater than 0, not -3",
        "config.yaml:9:16  model.blocks.b.0.type: own_shift cannot be bidirectional; "
        "set model.bidirectional: false, or use another token mixer",
        "config.yaml:9:27  model.blocks.b.0.distanc: unknown key; did you mean 'distance'?",
    ]


@pytest.mark.usefixtures("_own_parts")
def test_a_plugin_that_fails_is_one_problem_beside_the_others(write: Write, problems: Any) -> None:
    where = write("own_parts.py", "\nraise RuntimeError('not today')")
    found = problems(write("config.yaml", CONFIG.replace("seq_len: 8", "seq_len: 1")))
    assert found[0] == (
        "config.yaml:1:11  plugins.0: the plug-in 'own_parts' cannot be imported: RuntimeError: not today; "
        f"see {Path(where).absolute()}:2"
    )
    assert any("data.seq_len: must be at least 2, not 1" in line for line in found)


@pytest.mark.usefixtures("_own_parts")
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x = 1\nx x", "own_parts.py:2"),
        ("import not_there", "own_parts.py:1"),
        (PLUGIN.replace('    implementation = "own_parts:Scale"\n', ""), 'set implementation = "module:Class"'),
    ],
    ids=["no Python", "imports what is not there", "builds nothing"],
)
def test_what_is_wrong_with_a_plugin_is_said_with_its_place(write: Write, problems: Any, text: str, said: str) -> None:
    write("own_parts.py", text)
    found = problems(write("config.yaml", CONFIG))
    assert found[0].endswith(said)
    assert "PYTHONPATH" not in found[0]


@pytest.mark.usefixtures("_own_parts")
@pytest.mark.parametrize("named", ["own_parts:Scales", "own_part:Scale", "Scale"])
def test_an_implementation_that_is_not_there_is_no_bug_of_ours(write: Write, named: str) -> None:
    write("own_parts.py", PLUGIN.replace("own_parts:Scale", named))
    norm = load_experiment(write("config.yaml", CONFIG)).model.norm
    with pytest.raises(ConfigError, match=f"the implementation '{named}' cannot be imported"):
        norm.build(5)


def test_the_restored_registry_knows_no_plugin(small: dict[str, Any]) -> None:
    assert "own_shift" not in variants("part")
    small["model"]["norm"] = {"type": "own_scale"}
    with pytest.raises(ConfigProblems, match="'own_scale' is no known type"):
        load_experiment_from_dict(small)


def test_a_builtin_variant_is_found_by_the_name_of_its_file() -> None:
    """`variant` imports ``<tag>_config`` and nothing else, so the two names must agree."""
    for family, package in PACKAGES.items():
        for tag, cls in variants(family).items():
            assert cls.__module__ == f"{package}.{tag}_config"


def test_reading_a_config_imports_only_the_variants_it_uses(write: Write, small_yaml: str) -> None:
    write("small.yaml", small_yaml)
    code = "import sys; from graft.config.load import load_experiment as load; load('small.yaml'); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.rpartition(".")[2] for name in done.stdout.split() if name.endswith("_config")}
    used = {"rms_norm", "attention", "rope", "mlp", "causal_lm", "embedded", "bytes", "adamw", "cosine"}
    assert {f"{tag}_config" for tag in used} <= loaded
    assert not loaded & {"mamba2_config", "moe_config", "muon_config", "dyt_config", "jsonl_config", "wsd_config"}


def test_a_plugin_cannot_take_the_tag_of_a_builtin_variant_that_nothing_imported_yet(write: Write) -> None:
    write("own_parts.py", PLUGIN.replace('["own_scale"] = knob("own_scale"', '["dyt"] = knob("dyt"'))
    code = "from graft.config.registry import load_plugins as load; load(('own_parts',))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert "the type 'dyt' of family 'norm' is defined twice" in done.stderr


@pytest.mark.usefixtures("registry_restored")
def test_a_tag_is_taken_once_in_a_family_and_its_union() -> None:
    with pytest.raises(ConfigError, match="'rms_norm' of family 'norm' is defined twice"):

        class Again(NormConfig):
            type: Literal["rms_norm"] = knob("rms_norm", "tag")

    with pytest.raises(ConfigError, match="'attention' of family 'channel_mixer' is defined twice"):

        class Clash(ChannelMixerConfig):
            type: Literal["attention"] = knob("attention", "tag")

    cls = variants("norm")["rms_norm"]
    register("norm", "rms_norm", cls)  # the same class again (a reload) is no clash
    assert variants("norm")["rms_norm"] is cls
