"""docs/python.md: its blocks are one program, and it runs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = "".join(re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/python.md").read_text(), re.MULTILINE | re.DOTALL))
LESS = ["data.source.max_characters=60000", "data.tokenizer.vocab_size=300", "evaluation.max_sequences=4"]


@pytest.mark.slow
def test_the_blocks_are_a_program_that_runs(tmp_path: Path) -> None:
    program = PROGRAM.replace('"name=small"', ", ".join(['"name=small"', *map(repr, LESS)]))
    assert program != PROGRAM
    checks = """
assert loss.item() > 0 and run.step == 4 and made.text is not None
assert all(bool((a == b).all()) for a, b in zip(again.state_dict().values(), model.state_dict().values()))
assert score.num_documents == 1 and 0 < score.bits_per_byte < 20
assert not loaded.model.training and not any(p.requires_grad for p in loaded.model.parameters())
assert run.model.training and experiment.replace(seed=1).seed == 1
"""
    done = subprocess.run(
        [sys.executable, "-c", program + checks],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
