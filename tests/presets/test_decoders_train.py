"""Every decoder preset trains on the embedded corpus at its full size."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from graft import api
from graft.config.load import load_experiment

MODELS = Path(__file__).parents[2] / "presets" / "models"
BRIEF = (
    *("data.source={type: embedded, max_characters: 60000}", "data.tokenizer={type: bytes}", "data.seq_len=64"),
    *(
        "training={max_steps: 4, global_batch_size: 1, micro_batch_size: 1}",
        "schedule={type: constant}",
        "optimizer.learning_rate=1e-3",
    ),
    *("evaluation={interval: 4, max_sequences: 4}", "checkpoint.interval=null", "logging.usage_interval=null"),
    *("precision=fp32", "runtime.compile=false"),
)


def decoders() -> list[str]:
    """Models of their own shape: one preset per mixer differs from the default's in the mixer alone."""
    paths = [path for path in MODELS.glob("*.yaml") if not path.stem.endswith("_small") or path.stem.startswith("moc")]
    return sorted(path.stem for path in paths if not load_experiment(path).model.bidirectional)


@pytest.mark.slow
@pytest.mark.parametrize("name", decoders())
def test_four_updates_lower_the_held_out_loss(name: str, tmp_path: Path) -> None:
    experiment = load_experiment(MODELS / f"{name}.yaml", [*BRIEF, f"runtime.cache_dir={tmp_path}/cache"])
    api.train(experiment, out=tmp_path / "run", stream=io.StringIO())
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    before, *_, after = [line["loss"] for line in lines if line["kind"] == "eval"]
    assert after < before
