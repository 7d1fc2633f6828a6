"""The page of a run: what it shows comes from the run's files, and it needs nothing beside itself."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from graft.config.identity import resolved_yaml
from graft.config.load import load_experiment_from_dict
from graft.errors import CheckpointError
from graft.evals.ngram import ngram_bits_per_byte
from graft.report.baselines import baselines_of, measure_baselines
from graft.report.charts import bar_chart, line_chart
from graft.report.page import RunRecord, comparison, write_report


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A finished run's files, made by hand: only what the report reads."""
    text = tmp_path / "text.txt"
    text.write_text(
        "\n\n".join(f"the {w} cat sat on the {w} mat" for w in ["red", "green", "blue", "pink", "old", "new"])
    )
    experiment = load_experiment_from_dict(
        {
            "name": "shown",
            "model": {
                "hidden_size": 8,
                "num_layers": 1,
                "norm": {"type": "rms_norm"},
                "blocks": {"b": [{"type": "mlp", "intermediate_size": 8}]},
            },
            "objective": {"type": "causal_lm"},
            "data": {
                "source": {"type": "files", "path": str(text), "document": "paragraph"},
                "validation": {"fraction": 0.4},
                "tokenizer": {"type": "bytes"},
                "seq_len": 16,
            },
            "optimizer": {"type": "adamw", "learning_rate": 1e-3},
            "schedule": {"type": "constant"},
            "training": {"max_steps": 20, "global_batch_size": 2},
            "runtime": {"cache_dir": str(tmp_path / "cache")},
        }
    )
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.resolved.yaml").write_text(resolved_yaml(experiment))
    (folder / "status.json").write_text(json.dumps({"state": "done", "reason": "", "step": 20}))
    (folder / "env.json").write_text(json.dumps({"torch": "9.9.9"}))
    lines = [
        {"kind": "eval", "step": 0, "bpb": 8.1, "loss": 5.6},
        {"kind": "train", "step": 10, "bpb": 4.0, "learning_rate": 1e-3, "tokens": 320, "time": {"seconds": 2.0}},
        {"kind": "eval", "step": 10, "bpb": 3.5, "loss": 2.4},
        {"kind": "eval", "step": 20, "bpb": 3.25, "loss": 2.25},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    events = [
        {"event": "samples", "step": 10, "texts": ["an early one"]},
        {"event": "samples", "step": 20, "texts": ["a <late> one & more"]},
        {"event": "warning", "step": 5, "text": "the disk is nearly full"},
    ]
    (folder / "events.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    return folder


def test_page_shows_the_run(run_dir: Path) -> None:
    page = write_report(run_dir).read_text()
    assert "3.2500" in page
    assert "a &lt;late&gt; one &amp; more" in page
    assert "an early one" not in page
    assert "the disk is nearly full" in page
    assert "9.9.9" in page
    assert "shown" in page
    assert "unigram" in page


def test_page_needs_nothing_beside_itself(run_dir: Path) -> None:
    page = write_report(run_dir).read_text()
    assert not re.search(r"<script|<link|https?://|src=|@import|url\(", page)


def test_comparison_has_best_untrained_and_counting(run_dir: Path) -> None:
    record = RunRecord.read(run_dir)
    scores = comparison(record)
    assert scores["this run"] == 3.25
    assert scores["untrained"] == 8.1
    assert scores["5-gram"] < scores["unigram"] < 8


def test_baselines_score_the_rows_the_run_is_scored_on(run_dir: Path, tmp_path: Path) -> None:
    """One held-out row of known text: the same figure as counting by hand."""
    experiment = RunRecord.read(run_dir).experiment
    from graft.data.loader import validation_batches
    from graft.data.prepare import prepare

    prepared = prepare(experiment)
    rows = [
        b.targets_BT[i].tolist() for b in validation_batches(prepared, experiment) for i in range(len(b.targets_BT))
    ]
    held_out = [piece.encode() for row in rows for piece in "".join(map(_byte, row)).split("\0") if piece]
    documents = (tmp_path / "text.txt").read_text().split("\n\n")
    kept = [prepared.tokenizer.decode(prepared.train.document(i).tolist()) for i in range(prepared.train.num_documents)]
    assert set(kept) < set(documents)
    expected = ngram_bits_per_byte([k.encode() for k in kept], held_out, 5)
    assert measure_baselines(experiment)["5-gram"] == pytest.approx(expected, rel=1e-12)


def _byte(token: int) -> str:
    return chr(token) if 0 <= token < 256 else "\0"


def test_baselines_are_kept(run_dir: Path) -> None:
    experiment = RunRecord.read(run_dir).experiment
    first = baselines_of(run_dir, experiment)
    (run_dir / "baselines.json").write_text(json.dumps({"unigram": 1.5}))
    assert first["unigram"] != 1.5
    assert baselines_of(run_dir, experiment) == {"unigram": 1.5}


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no run"):
        write_report(tmp_path)


def test_line_chart_places_points_and_skips_what_is_not_finite() -> None:
    chart = line_chart({"loss": [(0, 1.0), (1, float("nan")), (2, 3.0)]}, levels={"goal": 2.0})
    (points,) = re.findall(r'points="([^"]+)"', chart)
    (x0, y0), (x1, y1) = (tuple(map(float, p.split(","))) for p in points.split())
    assert x0 < x1
    assert y0 > y1  # larger values are higher up
    level = float(re.search(r'class="level"[^>]* y1="([\d.]+)"', chart)[1])  # type: ignore[index]
    assert level == pytest.approx((y0 + y1) / 2, abs=0.2)
    assert line_chart({"nothing": []}) == ""


def test_bar_lengths_are_proportional() -> None:
    chart = bar_chart({"a": 4.0, "b": 2.0}, highlight="b", unit="bpb")
    widths = [float(w) for w in re.findall(r'width="([\d.]+)" height="20"', chart)]
    assert widths[0] == pytest.approx(2 * widths[1])
    assert chart.index(">a<") < chart.index(">b<")
