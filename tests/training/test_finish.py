"""What a finished run leaves behind beside its numbers: the report, next to the untrained model and counting."""

from __future__ import annotations

from graft import api


def test_a_finished_run_has_a_report_with_its_baselines(tiny, tmp_path):
    run = api.train(tiny("training.max_steps=2"), out=tmp_path / "run")
    page = (tmp_path / "run" / "report.html").read_text()
    for words in ("untrained", "unigram", "5-gram", "this run", "done"):
        assert words in page, words
    assert run.best_loss is not None


def test_a_resumed_run_does_not_score_the_untrained_model_again(tiny, tmp_path):
    from graft.training.metrics import read_lines

    api.train(tiny("training.max_steps=2", "checkpoint.interval=1"), out=tmp_path / "run")
    api.train(tiny("training.max_steps=2", "checkpoint.interval=1"), out=tmp_path / "run", resume="auto")
    scored = [line["step"] for line in read_lines(tmp_path / "run" / "metrics.jsonl") if line["kind"] == "eval"]
    assert scored == [0, 2]
