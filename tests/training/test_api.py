"""The Python API and the verb over it."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import threading

import pytest
import torch

import graft
from graft import api
from graft.cli.main import run as command
from tiny_run import assert_same_weights, tiny_dict


@pytest.fixture
def config(tiny, tmp_path):
    path = tmp_path / "tiny.yaml"
    tiny()  # writes the text
    path.write_text("# the tiny one\n" + json.dumps(tiny_dict(tmp_path), indent=1))
    return path


def test_the_package_offers_the_api_without_importing_torch():
    code = (
        "import sys, graft; assert 'torch' not in sys.modules; assert 'train' in dir(graft);"
        "import graft.api; graft.load; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert graft.train is api.train
    with pytest.raises(AttributeError, match="no attribute 'trane'"):
        graft.trane  # noqa: B018


def test_build_gives_the_model_that_training_starts_from(config):
    experiment = graft.load(config, ["training.max_steps=2", "optimizer.learning_rate=1e-30"])
    model = graft.build(experiment)
    assert model(torch.zeros(1, 4, dtype=torch.int64)).shape == (1, 4, 257)
    trained = graft.train(experiment, stream=io.StringIO())
    for (name, start), end in zip(model.named_parameters(), trained.model.parameters(), strict=True):
        assert torch.allclose(start, end, rtol=0, atol=1e-20), name


def test_the_vocabulary_comes_from_the_config_the_tokenizer_or_the_data(config):
    assert graft.build(graft.load(config, ["model.vocab_size=300"])).vocab_size == 300
    characters = graft.build(graft.load(config, ["data.tokenizer={type: characters}"]))
    assert 10 < characters.vocab_size < 40


def test_training_works_in_another_thread(config):
    """Signal handlers are the main thread's affair; a notebook's worker thread can train all the same."""
    results = []
    thread = threading.Thread(target=lambda: results.append(graft.train(graft.load(config), stream=io.StringIO())))
    thread.start()
    thread.join()
    assert results[0].step == 12


def test_the_verb_trains_prints_the_directory_and_refuses_to_do_so_twice(config, tmp_path, capsys):
    assert command(["train", str(config), "training.max_steps=2", "--out", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    assert f"run directory {tmp_path / 'run'}" in out
    assert "step 2/2" in out
    assert "--- sample at step 2 ---" in out
    kept = (tmp_path / "run" / "config.yaml").read_text()
    assert kept.startswith("# the tiny one\n")
    assert "# overrides: training.max_steps=2" in kept
    assert command(["train", str(config), "training.max_steps=2", "--out", str(tmp_path / "run")]) == 4
    assert "already holds a run" in capsys.readouterr().err


def test_the_verb_prints_one_json_object(config, tmp_path, capsys):
    out = tmp_path / "run"
    arguments = ["train", str(config), "training.max_steps=2", "--out", str(out), "--resume", "auto", "--json"]
    assert command(arguments) == 0
    captured = capsys.readouterr()
    summary = json.loads(captured.out)
    assert (summary["run_directory"], summary["step"], summary["tokens"]) == (str(out), 2, 256)
    assert summary["evaluation"]["step"] == 2
    assert summary["best_loss"] == summary["evaluation"]["loss"]
    assert "step 2/2" in captured.err
    assert command(arguments) == 0, "resuming a finished run is no error"
    assert json.loads(capsys.readouterr().out) == summary


def test_the_default_directory_is_named_by_the_id(config, tmp_path):
    from graft.config.identity import run_id

    experiment = graft.load(config, ["training.max_steps=2"])
    one = graft.train(experiment, stream=io.StringIO())
    assert one.directory == tmp_path / "runs" / run_id(experiment)
    other = graft.train(graft.load(config, ["training.max_steps=2", "seed=1"]), stream=io.StringIO())
    assert other.directory != one.directory
    with pytest.raises(AssertionError):
        assert_same_weights(one, other)
