"""What the contract tests run on: every variant's preset, and compositions drawn from the parts those presets show."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from hypothesis import assume
from hypothesis import strategies as st
from pydantic import ValidationError

from graft.config.experiment import Experiment
from graft.config.load import load_experiment
from graft.config.model import ModelConfig
from graft.contracts.subject import Subject

PRESETS = Path(__file__).parents[2] / "presets"
NETWORK_FOLDERS = {"token_mixers", "channel_mixers", "memories", "norms", "positions", "linears"}
"""Presets whose network differs from the others'; those of optimizers, data and the like share one."""


def network_presets() -> list[Path]:
    """The small presets of the variants that make up a network, one per variant."""
    return sorted(p for p in PRESETS.glob("*/*.yaml") if p.parent.name in NETWORK_FOLDERS)


@cache
def experiment(path: Path) -> Experiment:
    return load_experiment(path)


def subject(path: Path) -> Subject:
    """The network of a preset, over a few ids only."""
    return Subject.of(experiment(path))


def _plain(config: Any) -> dict[str, Any]:
    return config.model_dump(mode="json", exclude_unset=True) | {"type": config.type}


@cache
def _shown(kind: str) -> tuple[str, ...]:
    """Distinct tables of one kind found in the presets, as repr strings (hashable)."""
    found: dict[str, None] = {}
    for path in network_presets():
        model = experiment(path).model
        tables: list[Any] = []
        for parts in model.blocks.values():
            for part in parts:
                if kind == "part":
                    tables.append(part)
                elif kind == "position" and getattr(part, "position", None) is not None:
                    tables.append(part.position)
        if kind == "norm":
            tables.append(model.norm)
        for table in tables:
            found[repr(_plain(table))] = None
    return tuple(found)


def load_shown() -> None:
    """Reads the presets now: importing while hypothesis draws would touch the random state it watches."""
    for kind in ("part", "position", "norm"):
        _shown(kind)


def _tables(kind: str) -> st.SearchStrategy[dict[str, Any]]:
    import ast

    return st.sampled_from(_shown(kind)).map(ast.literal_eval)


@st.composite
def _embeddings(draw: st.DrawFn) -> dict[str, Any]:
    return {
        "size": draw(st.sampled_from([None, None, 6])),
        "scale": draw(st.sampled_from(["none", "sqrt_hidden_size", 2.0])),
        "conv": draw(st.sampled_from([None, {"kernel_size": 3}, {"kernel_size": 4, "depthwise": True}])),
        "token_type": draw(st.booleans()),
        "norm": draw(st.sampled_from([None, {"type": "rms_norm"}])),
    }


@st.composite
def compositions(draw: st.DrawFn) -> dict[str, Any]:
    """A small random network: any parts, norms, positions, placements, loops, in any layout; see `composed`."""
    placements = st.sampled_from(["pre", "post", "sandwich", "output"])

    def part() -> dict[str, Any]:
        table = draw(_tables("part"))
        if "position" in table:
            table["position"] = draw(_tables("position"))
        if draw(st.booleans()):
            table["norm_placement"] = draw(placements | st.just("none"))
        if draw(st.integers(0, 3)) == 0 and table.get("norm_placement") != "none":
            table["norm"] = draw(_tables("norm"))
        if draw(st.integers(0, 3)) == 0:
            table["layer_scale"] = 0.5
        return table

    num_blocks = draw(st.integers(1, 2))
    blocks = {f"b{i}": [part() for _ in range(draw(st.integers(1, 3)))] for i in range(num_blocks)}
    layout = draw(st.permutations(sorted(blocks)))
    return {
        "hidden_size": 16,
        "num_layers": num_blocks * draw(st.integers(1, 2)),
        "loops": draw(st.sampled_from([1, 1, 2])),
        "bidirectional": draw(st.booleans()),
        "norm": draw(_tables("norm")),
        "norm_placement": draw(placements),
        "residual_scale": draw(st.sampled_from([1.0, 0.5])),
        "embedding": draw(_embeddings()),
        "blocks": blocks,
        "layout": list(layout),
        "head": {
            "tie_word_embeddings": draw(st.booleans()),
            "logit_softcap": draw(st.sampled_from([None, 5.0])),
            "pad_vocab_to_multiple_of": draw(st.sampled_from([1, 8])),
            "transform": draw(st.sampled_from([None, None, {"norm": {"type": "layer_norm"}}])),
            "bias": draw(st.booleans()),
        },
        "init": {"residual": draw(st.sampled_from(["none", "depth"]))},
    }


def composed(data: dict[str, Any]) -> ModelConfig:
    """The network drawn; draws that mean nothing are thrown away."""
    try:
        return ModelConfig.model_validate(data)
    except ValidationError:
        assume(False)
        raise
