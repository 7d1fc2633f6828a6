"""What a config costs, as data and as a table for people."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from graft.config.roles import Role
from graft.cost.counts import PartCost
from graft.cost.memory import MemoryBytes


@dataclass(frozen=True)
class Parameters:
    """Parameter counts; a tied tensor counts once.

    Args:
        total: all.
        active: those that take part in computing one position.
        per_part: by kind of part, or by role where a parameter belongs to no part; adds up to ``total``.
        per_role: by role; adds up to ``total``.
    """

    total: int
    active: int
    per_part: Mapping[str, int]
    per_role: Mapping[Role, int]


@dataclass(frozen=True)
class FlopsPerToken:
    """FLOPs per position, averaged over one document of ``seq_len`` positions; a multiply and an add are 2.

    Args:
        forward: one forward pass.
        backward: twice the forward: a product of matrices has two gradients.
        recomputed: what activation checkpointing computes again.
    """

    forward: float
    backward: float
    recomputed: float


@dataclass(frozen=True)
class CostReport:
    """The price of a config before it runs.

    Args:
        name: the experiment's name.
        vocab_size: rows of the embedding that were priced, before padding.
        seq_len: training length in tokens.
        micro_batch_size: sequences per forward pass.
        precision: fp32, bf16 or fp16.
        parameters: counts.
        flops_per_token: per position.
        memory_bytes: of one training process.
        state_bytes_per_token: decode state of a sequence of ``seq_len`` positions, divided by ``seq_len``.
        state_bytes: that state as a whole, per sequence.
        parts: every part of every physical layer.
        steps: optimizer updates in the run.
        tokens_per_step: training positions per update.
        tokens: training positions in the run.
        training_flops: forward and backward over all tokens (recomputation aside).
        memory_limit_bytes: what this machine has for the process; None = unknown.
        warnings: what will not work or deserves a look.
    """

    name: str
    vocab_size: int
    seq_len: int
    micro_batch_size: int
    precision: str
    parameters: Parameters
    flops_per_token: FlopsPerToken
    memory_bytes: MemoryBytes
    state_bytes_per_token: float
    state_bytes: int
    parts: tuple[PartCost, ...]
    steps: int
    tokens_per_step: int
    tokens: int
    training_flops: float
    memory_limit_bytes: int | None
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for ``--json``: the fields above under their names."""
        return asdict(self)

    def render(self) -> str:
        """The report as lines of plain text."""
        return "\n".join(_lines(self))


def human_count(value: float) -> str:
    """``1234567`` as ``1.235 M``."""
    for size, letter in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g} {letter}"
    return f"{value:.4g}"


def human_bytes(value: float) -> str:
    """Bytes in binary units: ``1536`` as ``1.5 KiB``."""
    for power, unit in ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        if abs(value) >= 1024**power:
            return f"{value / 1024**power:.4g} {unit}"
    return f"{value:.4g} B"


def _table(title: str, rows: list[tuple[str, str]]) -> list[str]:
    names = max(len(name) for name, _ in rows)
    values = max(len(value) for _, value in rows)
    return [title, *(f"  {name:<{names}}  {value:>{values}}" for name, value in rows), ""]


def _lines(report: CostReport) -> list[str]:
    parameters, flops, memory = report.parameters, report.flops_per_token, report.memory_bytes
    share = sorted(parameters.per_part.items(), key=lambda item: -item[1])
    lines = _table(
        f"{report.name}: parameters",
        [
            ("total", f"{parameters.total:,}"),
            ("active per token", f"{parameters.active:,}"),
            *((name, f"{count:,}") for name, count in share),
        ],
    )
    lines += _table(
        f"FLOPs per token at {report.seq_len} tokens",
        [
            ("forward", human_count(flops.forward)),
            ("backward", human_count(flops.backward)),
            *([("recomputed", human_count(flops.recomputed))] if flops.recomputed else []),
        ],
    )
    lines += _table(
        f"training memory, {report.micro_batch_size} x {report.seq_len} tokens in {report.precision}",
        [
            ("weights", human_bytes(memory.weights)),
            ("gradients", human_bytes(memory.gradients)),
            ("optimizer", human_bytes(memory.optimizer)),
            ("activations", human_bytes(memory.activations)),
            ("logits and loss", human_bytes(memory.logits)),
            ("update", human_bytes(memory.update)),
            ("inside operations", human_bytes(memory.scratch)),
            ("lost in the heap", human_bytes(memory.heap)),
            ("peak (not all at once)", human_bytes(memory.total)),
        ],
    )
    lines += _table(
        "decoding",
        [
            ("state per token", human_bytes(report.state_bytes_per_token)),
            (f"state at {report.seq_len} tokens", human_bytes(report.state_bytes)),
        ],
    )
    lines += _table(
        "run",
        [
            ("steps", f"{report.steps:,}"),
            ("tokens per step", f"{report.tokens_per_step:,}"),
            ("tokens", human_count(report.tokens)),
            ("training FLOPs", human_count(report.training_flops)),
        ],
    )
    return [*lines, *(f"warning: {text}" for text in report.warnings)]
