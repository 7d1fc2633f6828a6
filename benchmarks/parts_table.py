"""How fast is one layer of every part, in training and in decoding, at the shape of docs/parts.md?

Writes ``docs/parts_measured.json`` and makes ``docs/parts.md`` from it. The parts take turns, so that a load on the
machine meets all of them.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import median

import torch

from benchmarks.timing import environment
from graft.cost.parts_table import (
    HIDDEN_SIZE,
    SEQ_LEN,
    VOCAB_SIZE,
    Measured,
    Speed,
    common_part,
    one_layer,
    part_variants,
    parts_markdown,
)
from graft.model import Model, build_model
from graft.objectives.base import aux_total

DOCS = Path(__file__).parents[1] / "docs"
ROWS = 2
"""Sequences of a training pass."""
DECODED = 32
"""Tokens decoded at the end of a sequence."""


def built(family: str, tag: str) -> Model:
    """One layer with the part alone."""
    return build_model(one_layer(common_part(family, tag)), VOCAB_SIZE, seed=0)


def training_seconds(model: Model) -> float:
    """One forward and backward pass of the layer, auxiliary terms included, embedding and last norm with it."""
    ids_BT = torch.randint(VOCAB_SIZE, (ROWS, SEQ_LEN), generator=torch.Generator().manual_seed(0))
    direction_BTD = torch.randn(ROWS, SEQ_LEN, HIDDEN_SIZE, generator=torch.Generator().manual_seed(1))
    model.train()
    model.zero_grad(set_to_none=True)
    start = time.perf_counter()
    features = model.features(ids_BT)
    loss = (features.x_BTD * direction_BTD).sum()
    (loss + aux_total(features.aux, loss)).backward()
    return time.perf_counter() - start


@torch.no_grad()
def decoding_seconds(model: Model) -> float:
    """The last `DECODED` tokens of a sequence, one by one; the prefill before them is not timed."""
    ids_1T = torch.randint(VOCAB_SIZE, (1, SEQ_LEN), generator=torch.Generator().manual_seed(2))
    before = SEQ_LEN - DECODED
    model.eval()
    state = model.features(ids_1T[:, :before], state=model.init_state(1, SEQ_LEN)).state
    start = time.perf_counter()
    for t in range(before, SEQ_LEN):
        state = model.features(ids_1T[:, t : t + 1], state=state).state
    return time.perf_counter() - start


def run(args: argparse.Namespace) -> None:
    models = {f"{family}.{tag}": built(family, tag) for family, tag, _ in part_variants()}
    seconds: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in models}
    for turn in range(1 + args.rounds):
        for name, model in models.items():
            found = training_seconds(model), decoding_seconds(model)
            if turn:  # the first warms up
                for times, value in zip(seconds[name], found, strict=True):
                    times.append(value)
    speeds = {
        name: Speed(round(ROWS * SEQ_LEN / median(train), 1), round(DECODED / median(decode), 1))
        for name, (train, decode) in seconds.items()
    }
    where = (
        f"{environment()}; fp32, {ROWS} sequences of {SEQ_LEN} in training, the last {DECODED} tokens of one in "
        f"decoding, medians of {args.rounds} rounds in which the parts take turns."
    )
    measured = Measured(where, speeds)
    (DOCS / "parts_measured.json").write_text(measured.to_json())
    (DOCS / "parts.md").write_text(parts_markdown(measured))
    print(parts_markdown(measured))
