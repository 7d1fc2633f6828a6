"""What a finished run leaves behind beside its numbers: the report, next to the untrained model and counting."""

from __future__ import annotations

from graft import api


def test_a_finished_run_has_a_report_with_its_baselines(tiny, tmp_path):
    run = api.train(tiny("training.max_steps=2"), out=tmp_path / "run")
    page = (tmp_path / "run" / "report.html").read_text()
    for words in ("untrained", "unigram", "5-gram", "this run", "done"):
        assert words in page, words
    assert run.best_loss is not None


def test_a_run_resumed_on_other_held_out_rows_is_compared_with_counting_on_those(tiny, tmp_path):
    import json

    from graft.report.baselines import measure_baselines

    api.train(tiny("training.max_steps=3"), out=tmp_path / "run")
    other = tiny("training.max_steps=4", "evaluation.max_sequences=1")
    api.train(other, out=tmp_path / "run", resume="auto")
    assert json.loads((tmp_path / "run" / "baselines.json").read_text()) == measure_baselines(other)


def test_a_checkpoint_past_the_end_of_the_run_is_said_to_be(tiny, tmp_path, capsys):
    api.train(tiny("training.max_steps=4"), out=tmp_path / "run")
    api.train(tiny("training.max_steps=4"), out=tmp_path / "run", resume="auto")
    assert "nothing is left" not in capsys.readouterr().err
    api.train(tiny("training.max_steps=3"), out=tmp_path / "run", resume="auto")
    assert "warning: the run ends at step 3: nothing is left to train" in capsys.readouterr().err


def test_a_resumed_run_does_not_score_the_untrained_model_again(tiny, tmp_path):
    from graft.training.metrics import read_lines

    api.train(tiny("training.max_steps=2", "checkpoint.interval=1"), out=tmp_path / "run")
    api.train(tiny("training.max_steps=2", "checkpoint.interval=1"), out=tmp_path / "run", resume="auto")
    scored = [line["step"] for line in read_lines(tmp_path / "run" / "metrics.jsonl") if line["kind"] == "eval"]
    assert scored == [0, 2]
