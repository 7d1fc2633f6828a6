"""Runs with memories: banks rounded after training or while training, and the marks of a run that leaks the future."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from graft import api
from graft.cli.main import run as command
from graft.config.identity import resolved_yaml
from graft.config.model import ModelConfig
from graft.contracts.subject import loud
from graft.errors import ConfigError, ExitCode
from graft.memories.bank import banks, quantize_banks
from graft.model import Model, build_model
from graft.training.load import load_run
from graft.training.manifest import read_manifest
from tiny_run import lines, tiny

MEMORY = (
    "{type: memory_bank, num_slots: 16, num_heads: 2, num_chapters: 4, top_k_chapters: 2, routing: sequence, "
    "allow_noncausal_routing: true}"
)
ATTENTION = "{type: attention, num_heads: 2, position: {type: rope}}"


LEAKY = (f"model.blocks.main=[{ATTENTION}, {MEMORY}]", "training.max_steps=4", "logging.tensorboard=true")


@pytest.fixture(scope="module")
def leaky(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run whose memory is routed by the whole sequence."""
    place = tmp_path_factory.mktemp("leaky")
    run = api.train(tiny(place, *LEAKY), out=place / "run", stream=io.StringIO())
    assert run.marks == {"leaks_future": True}
    assert run.last_evaluation is not None
    assert run.last_evaluation[1]["leaks_future"] is True
    return place / "run"


def test_every_number_that_a_leaky_run_keeps_is_marked(leaky: Path) -> None:
    metrics = lines(leaky / "metrics.jsonl")
    assert {line["kind"] for line in metrics} >= {"train", "eval"}
    assert all(line["leaks_future"] is True for line in metrics)
    (saved, *_) = (event for event in lines(leaky / "events.jsonl") if "score" in event)
    assert saved["leaks_future"] is True
    checkpoint = load_run(leaky).checkpoint
    assert read_manifest(checkpoint).metadata["leaks_future"] is True
    numbers = [line for line in (leaky / "train.log").read_text().splitlines() if line.startswith("step ")]
    assert {line.split()[2] for line in numbers} == {"loss", "held-out"}
    assert all(line.endswith("  (leaks_future)") for line in numbers)
    assert "reads the future" in (leaky / "train.log").read_text()


def test_every_number_that_trackers_get_of_a_leaky_run_is_marked(leaky: Path) -> None:
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    (file,) = (leaky / "tensorboard").iterdir()
    tags = {value.tag for event in EventFileLoader(str(file)).Load() for value in event.summary.value}
    assert {"leaks_future/train/loss", "leaks_future/eval/loss"} <= tags
    assert all(tag.startswith("leaks_future/") for tag in tags)


def test_every_number_that_is_told_of_a_leaky_run_is_marked(leaky: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said(*words: str) -> str:
        assert command([words[0], str(leaky), *words[1:]]) == 0
        return capsys.readouterr().out

    assert json.loads(said("eval", "--validation", "--json", "--device", "cpu"))["leaks_future"] is True
    assert json.loads(said("report", "--json"))["leaks_future"] is True
    compared = [line.split("bits per byte")[1].strip() for line in said("report").splitlines()[:-1]]
    assert set(compared) == {"this run  (leaks_future)", "untrained  (leaks_future)", "unigram", "5-gram"}
    page = (leaky / "report.html").read_text()
    assert "reads the future" in page
    for name in ("held-out bits per byte", "held-out perplexity", "training", "held out", "this run", "untrained"):
        assert re.search(rf">{re.escape(name)}  \(leaks_future\)<", page)
    assert command(["generate", str(leaky), "--max-new-tokens", "1", "--device", "cpu"]) == 0
    assert "reads the future" in capsys.readouterr().err


def test_what_train_says_last_of_a_leaky_run_is_marked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(resolved_yaml(tiny(tmp_path, *LEAKY)))
    short = ["train", str(config), "training.max_steps=2"]
    assert command([*short, "--out", str(tmp_path / "told")]) == 0
    assert "this run  (leaks_future)\n" in capsys.readouterr().out
    assert command([*short, "--out", str(tmp_path / "json"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["leaks_future"] is True
    assert report["evaluation"]["leaks_future"] is True


def test_a_run_without_a_leak_is_not_marked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(resolved_yaml(tiny(tmp_path, "training.max_steps=2", "logging.tensorboard=true")))
    out = tmp_path / "run"
    assert command(["train", str(config), "--out", str(out), "--json"]) == 0
    assert command(["eval", str(out), "--validation", "--device", "cpu"]) == 0
    assert command(["report", str(out)]) == 0
    written = [path for path in out.rglob("*") if path.is_file() and path.suffix != ".safetensors"]
    assert {path.name for path in written} >= {"metrics.jsonl", "events.jsonl", "train.log", "report.html"}
    assert not [path for path in written if b"(leaks_future)" in path.read_bytes()]
    assert "leaks_future" not in "".join(capsys.readouterr())
    assert not any("leaks_future" in line for line in lines(out / "metrics.jsonl") + lines(out / "events.jsonl"))
    assert "leaks_future" not in read_manifest(load_run(out).checkpoint).metadata


def test_eval_says_what_rounding_costs(leaky: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = ["eval", str(leaky), "--validation", "--device", "cpu"]
    assert command([*base, "--memory-bits", "4", "--memory-group-size", "8", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["rounded"]["memory_bits"] == 4
    assert report["memory_bytes"] == 16 * 32 * 4
    assert report["rounded"]["memory_bytes"] == 16 * 32 // 2 + 16 * (32 // 8) * 4
    assert report["rounded"]["loss"] == pytest.approx(report["loss"], rel=1e-2)
    assert report["rounded"]["loss"] != report["loss"]
    assert report["rounded"]["leaks_future"] is True
    assert command([*base, "--memory-bits", "8"]) == 0
    said = capsys.readouterr().out
    assert "rounded:" in said
    assert said.count("perplexity") == 2
    assert command([*base, "--memory-bits", "5"]) == ExitCode.CONFIG
    assert command([*base, "--memory-group-size", "8"]) == ExitCode.CONFIG
    assert command([*base, "--memory-bits", "8", "--memory-group-size", "7"]) == ExitCode.CONFIG


@torch.no_grad()
def test_a_rounded_run_is_read_like_any_other(leaky: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "rounded"
    assert command(["quantize", str(leaky), "--out", str(out), "--memory-bits", "4", "--memory-group-size", "8"]) == 0
    assert "0 layers packed, memory rounded to 4 bits" in capsys.readouterr().out
    before, after = load_run(leaky), load_run(out)
    rounded = before.model
    quantize_banks(rounded, 4, 8)
    ids = torch.randint(256, (2, 16))
    assert torch.equal(after.model(ids), rounded(ids))
    assert rounded.state_dict().keys() == after.model.state_dict().keys()
    manifest = read_manifest(after.checkpoint)
    assert manifest.score is None  # that of the run was measured with other slots
    assert manifest.metadata["leaks_future"] is True
    assert command(["eval", str(out), "--validation", "--device", "cpu", "--memory-bits", "8"]) == ExitCode.CONFIG
    assert command(["quantize", str(leaky), "--out", str(tmp_path / "none")]) == ExitCode.CONFIG  # nothing is ternary


def model(**fields: Any) -> Model:
    memory = {"type": "memory_bank", "num_slots": 12, "num_heads": 2, **fields}
    blocks = {"b": [memory, {"type": "mlp", "intermediate_size": 8}]}
    config = {"hidden_size": 8, "num_layers": 3, "norm": {"type": "rms_norm"}, "blocks": blocks}
    made = build_model(ModelConfig.model_validate(config), 19, seed=0)
    loud(made, 0)
    return made


@pytest.mark.parametrize("fields", [{}, {"sharing": "per_layer"}, {"low_rank_mode": "factorized", "rank": 4}])
def test_more_bits_and_smaller_groups_are_closer(fields: dict[str, Any]) -> None:
    ids, errors = torch.randint(19, (2, 9)), []
    exact = model(**fields)
    for bits, group_size in ((8, None), (4, 2), (4, None)):
        rounded = model(**fields)
        before, after = quantize_banks(rounded, bits, group_size)
        assert after < before
        pairs = zip(banks(rounded), banks(exact), strict=True)
        errors.append(sum((a.rows() - b.rows()).square().sum().item() for a, b in pairs))
        assert not torch.equal(rounded(ids), exact(ids))
    assert 0 < errors[0] < errors[1] < errors[2]


def test_training_with_rounded_slots_computes_what_the_converted_bank_does() -> None:
    trained = model(quantization={"bits": 4, "group_size": 4})
    ids = torch.randint(19, (2, 9))
    rounded = trained(ids)
    assert not torch.equal(rounded, model()(ids))
    rounded.square().sum().backward()
    assert all(bank.slots.grad is not None and bank.slots.grad.all() for bank in banks(trained))
    quantize_banks(trained, 4, 4)
    torch.testing.assert_close(trained(ids), rounded, rtol=1e-5, atol=1e-5)


def test_what_cannot_be_rounded() -> None:
    with pytest.raises(ConfigError, match="groups of 3 do not divide 8"):
        quantize_banks(model(), 8, 3)
    with pytest.raises(ConfigError, match="even width, not 3"):
        quantize_banks(model(low_rank_mode="factorized", rank=3), 4)
    with pytest.raises(ConfigError, match="no memory bank"):
        quantize_banks(torch.nn.Linear(2, 2), 8)
    converted = model()
    quantize_banks(converted, 8)
    with pytest.raises(ConfigError, match="rounded already"):
        quantize_banks(converted, 4)
