"""quantize: a run packed into a run of its own, read by everything that reads runs."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from graft import api
from graft.cli.main import run as command
from graft.errors import CheckpointError, ConfigError
from graft.linears.packed_ternary import PackedTernary
from graft.training.load import load_run
from graft.training.quantize import quantize_run
from tiny_run import tiny


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("quantize")
    changes = ("training.max_steps=4", "model.linear={type: bitlinear, warmup_steps: 4}", "checkpoint.interval=2")
    api.train(tiny(place, *changes), out=place / "run", stream=io.StringIO())
    return place / "run"


@torch.no_grad()
def test_the_packed_run_computes_the_same_from_less(trained: Path, tmp_path: Path) -> None:
    done = quantize_run(trained, tmp_path / "packed")
    before, after = load_run(trained), load_run(tmp_path / "packed")
    assert done.step == after.step == before.step == 4
    assert after.checkpoint == done.checkpoint
    assert after.experiment == before.experiment
    layers = [m for m in after.model.modules() if isinstance(m, PackedTernary)]
    assert len(layers) == len(done.layers) == 2 * (4 + 3)
    ids = torch.randint(256, (2, 16))
    torch.testing.assert_close(after.model(ids), before.model(ids), rtol=1e-3, atol=1e-3)
    file = done.checkpoint / "model.safetensors"
    assert done.bytes_after < file.stat().st_size < done.bytes_after + 10_000
    ternary = sum(m.in_features * m.out_features for m in layers)
    counters = sum(8 for name in before.model.state_dict() if name.endswith(".updates"))
    scales = 4 * len(layers)
    assert done.bytes_before - done.bytes_after == 4 * ternary - ternary // 4 + counters - scales


def test_the_verb_and_what_reads_its_result(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "packed"
    assert command(["quantize", str(trained), "--out", str(out), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert len(said["layers"]) == 14
    assert said["bytes_after"] < said["bytes_before"]
    assert command(["generate", str(out), "--prompt", "the cat", "--max-new-tokens", "3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["generations"][0]["tokens"] == 3
    assert command(["generate", str(out), "--dtype", "bf16", "--max-new-tokens", "2"]) == 0
    assert command(["quantize", str(trained), "--out", str(tmp_path / "again")]) == 0
    assert "14 layers packed" in capsys.readouterr().out


def test_a_run_of_ternary_experts_is_packed_too(tmp_path: Path) -> None:
    moe = "{type: moe, num_experts: 4, intermediate_size: 16}"
    changes = ("training.max_steps=2", "model.linear={type: bitlinear}", f"model.blocks.main=[{moe}]")
    api.train(tiny(tmp_path, *changes), out=tmp_path / "run", stream=io.StringIO())
    done = quantize_run(tmp_path / "run", tmp_path / "packed")
    assert len(done.layers) == 2 * 3
    before, after = load_run(tmp_path / "run"), load_run(tmp_path / "packed")
    ids = torch.randint(256, (2, 16))
    with torch.no_grad():
        torch.testing.assert_close(after.model(ids), before.model(ids), rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_packed_experts_are_decoded_compiled(
    tmp_path: Path, compiling: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The verb with --compile writes what it writes without, and the experts' products are in its graphs."""
    from graft.ops import packed_experts

    moe = "{type: moe, num_experts: 4, intermediate_size: 16, bias: true}"
    changes = ("training.max_steps=3", "optimizer.learning_rate=0.3", "model.linear={type: bitlinear}")
    places = (f"model.blocks.main.1={moe}", "schedule={type: constant}")
    api.train(tiny(tmp_path, *changes, *places), out=tmp_path / "run", stream=io.StringIO())
    quantize_run(tmp_path / "run", tmp_path / "packed")
    eager: list[bool] = []
    multiply = packed_experts.grouped_linear

    def watched(*arguments: Any, **named: Any) -> torch.Tensor:
        eager.append(not torch.compiler.is_compiling())
        return multiply(*arguments, **named)

    def written(*extra: str) -> list[str]:
        line = ["generate", str(tmp_path / "packed"), "--prompt", "the cat", "--max-new-tokens", "12", "--json"]
        assert command([*line, *extra]) == 0
        return [made["text"] for made in json.loads(capsys.readouterr().out)["generations"]]

    plain = written()
    monkeypatch.setattr(packed_experts, "grouped_linear", watched)
    assert written("--compile") == plain
    assert False in eager, "no product of experts was compiled"


def test_what_cannot_be_packed(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="2 of its 4 warm-up updates"):
        quantize_run(trained / "checkpoints/step-00000002", tmp_path / "early")
    assert not (tmp_path / "early").exists()
    with pytest.raises(CheckpointError, match="already holds"):
        quantize_run(trained, trained)
    quantize_run(trained, tmp_path / "packed")
    with pytest.raises(ConfigError, match="no ternary layer"):
        quantize_run(tmp_path / "packed", tmp_path / "twice")


def test_weights_in_bf16_leave_whole_numbers_alone(trained: Path) -> None:
    state = load_run(trained, dtype=torch.bfloat16).model.state_dict()
    assert {t.dtype for name, t in state.items() if name.endswith(".updates")} == {torch.int64}
    assert {t.dtype for name, t in state.items() if not name.endswith(".updates")} == {torch.bfloat16}
