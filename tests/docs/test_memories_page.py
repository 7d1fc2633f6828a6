"""docs/memories.md: its examples are valid, and what it names exists."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args

import pytest
from ruamel.yaml import YAML
from typer.testing import CliRunner

from graft.cli.eval import app as eval_app
from graft.cli.quantize import app as quantize_app
from graft.config.model import ModelConfig
from graft.config.placement import LayerRule
from graft.memories.memory_bank_config import MemoryBankConfig, Routing

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "memories.md").read_text()
EXAMPLES: list[str] = re.findall(r"```yaml\n(.*?)```", PAGE, re.S)


@pytest.mark.parametrize("example", EXAMPLES)
def test_examples_are_models(example: str) -> None:
    blocks: dict[str, Any] = YAML(typ="safe", pure=True).load(example)["blocks"]
    norm = {"type": "rms_norm"}
    shape = {"hidden_size": 16, "num_layers": len(blocks), "layout": list(blocks), "norm": norm}
    assert not ModelConfig.model_validate({**shape, "blocks": blocks}).leaks_future


def test_every_routing_is_in_the_table() -> None:
    assert re.findall(r"^\| `(\w+)` \|", PAGE, re.M) == list(get_args(Routing))


def test_what_is_named_exists() -> None:
    fields = set(MemoryBankConfig.model_fields)
    for name in re.findall(r"`(routing_\w+|sharing\w*|allow_\w+|num_\w+|bank|layers)[`:]", PAGE):
        assert name in fields, name
    assert set(re.findall(r"`\{(\w+): \d\}`", PAGE)) == set(LayerRule.model_fields)
    assert all(list(ROOT.glob(f"presets/**/{name}")) for name in re.findall(r"(\w+\*?\.yaml)", PAGE))
    said = "".join(
        CliRunner().invoke(app, ["--help"], env={"COLUMNS": "200"}).output for app in (eval_app, quantize_app)
    )
    for option in re.findall(r"--[a-z][a-z-]+", PAGE):
        assert option in said, option
