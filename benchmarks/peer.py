"""What does a step over very many experts cost, and how much memory? Each figure is a process of its own."""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.timing import record, table
from graft.channel_mixers.peer_config import PeerConfig
from graft.config.model import InitConfig
from graft.initialization import initialize
from graft.linears.dense_config import DenseConfig
from graft.norms.rms_norm_config import RMSNormConfig
from graft.optimizers.adamw_config import AdamWConfig
from graft.optimizers.groups_config import RoleOverride
from graft.part import Context, Site
from graft.training.gradients import gradient_values
from graft.training.runtime import memory_limit_bytes, peak_memory_bytes, tune_allocator

TOKENS, HEADS, CHOSEN, QUERY = 512, 8, 16, 256
CASES = ((512, 768), (1024, 256), (1024, 768))
"""Side of the square grid of experts, and width of the stream."""

COPIES = {"rowwise_adagrad": 1.3, "rowwise_adam": 3.3, "dense AdamW": 4.3, "embeddings, SparseAdam": 3.7}
"""Variant -> memory it needs at least, in tables: weights, moments, dense gradients and temporaries."""

STEPS = 4
ROOM = 0.85
"""Share of the machine's memory that a variant may be expected to use."""

Step = Callable[[], tuple[float, float, float]]


@dataclass(frozen=True)
class Figures:
    """Seconds of the parts of one step (medians), of the whole, of processor time, and the process's peak memory."""

    forward: float
    backward: float
    update: float
    seconds: float
    cpu_seconds: float
    memory: float


def run(args: argparse.Namespace) -> None:
    sections = [compare(side, width, rounds=max(1, args.rounds // 2)) for side, width in CASES]
    record(
        "Experts by product keys",
        f"One layer on {TOKENS} positions, {HEADS} heads that each choose {CHOSEN} experts of one unit, queries of "
        f"{QUERY} channels with a layer norm, fp32: forward, backward, update. The last is "
        "the paper written with two sparse embedding tables, the others are graft's.\n\n" + "\n\n".join(sections),
    )


def compare(side: int, width: int, *, rounds: int) -> str:
    """The table of one case."""
    tables_bytes, limit = 2 * side * side * width * 4, memory_limit_bytes() or math.inf
    rows: list[list[str]] = []
    first: Figures | None = None
    for name, copies in COPIES.items():
        if copies * tables_bytes > ROOM * limit:
            rows.append([name, "does not fit", *[""] * 6])
            continue
        measured = [child(name, side, width) for _ in range(rounds)]
        figures = Figures(*(median(values) for values in zip(*(vars(m).values() for m in measured), strict=True)))
        first = first or figures
        times = (figures.forward, figures.backward, figures.update, figures.seconds)
        ratios = (figures.seconds / first.seconds, figures.cpu_seconds / first.cpu_seconds)
        rows.append(
            [name, *(f"{1000 * t:,.0f}" for t in times), *(f"{r:.2f}" for r in ratios), f"{figures.memory / 1e9:.2f}"]
        )
    header = ["update", "forward, ms", "backward", "update", "step", "ratio", "ratio of processor time", "peak GB"]
    return f"{side * side:,} experts, width {width} (tables of {tables_bytes / 1e9:.2f} GB):\n\n{table(header, rows)}"


def child(name: str, side: int, width: int) -> Figures:
    """One variant in a fresh process."""
    command = [sys.executable, "-c", f"from benchmarks import peer; peer.measure({name!r}, {side}, {width})"]
    made = subprocess.run(command, capture_output=True, text=True, check=True)
    return Figures(**json.loads(made.stdout.splitlines()[-1]))


def measure(name: str, side: int, width: int) -> None:
    """Prints the `Figures` of one variant: medians over a few steps, after one that warms up."""
    tune_allocator()
    step = plain(side, width) if name.startswith("embeddings") else ours(name, side, width)
    parts: list[tuple[float, float, float]] = []
    cpu: list[float] = []
    for _ in range(1 + STEPS):
        start = time.process_time()
        parts.append(step())
        cpu.append(time.process_time() - start)
    forward, backward, update = (median(values) for values in zip(*parts[1:], strict=True))
    total = median(sum(p) for p in parts[1:])
    figures = Figures(forward, backward, update, total, median(cpu[1:]), peak_memory_bytes() or 0)
    print(json.dumps(vars(figures)))


def stepper(model: nn.Module, forward: Callable[[Tensor], Tensor], update: Callable[[], None], width: int) -> Step:
    """A step on new random positions: seconds of forward, backward and update."""

    def step() -> tuple[float, float, float]:
        x, target = torch.randn(TOKENS, width), torch.randn(TOKENS, width)
        times = [time.perf_counter()]
        loss = (forward(x) - target).square().mean()
        times.append(time.perf_counter())
        loss.backward()
        times.append(time.perf_counter())
        update()
        model.zero_grad(set_to_none=True)
        times.append(time.perf_counter())
        return times[1] - times[0], times[2] - times[1], times[3] - times[2]

    return step


def ours(name: str, side: int, width: int) -> Step:
    """graft's layer under one of its updates."""
    site = Site(width, 0, 1, 1, True, RMSNormConfig(), DenseConfig(), InitConfig())
    config = PeerConfig(
        product_key_dims=(side, side), num_experts_per_tok=CHOSEN, num_heads=HEADS, query_dim=QUERY, track_usage=True
    )
    with torch.device("meta"):
        model = config.build(site)
    model.to_empty(device="cpu")
    initialize(model, 0)
    groups: dict[Any, RoleOverride] = {}
    if name in ("rowwise_adagrad", "rowwise_adam"):
        groups = {"expert_table": RoleOverride(update=name)}
    optimizer = AdamWConfig(learning_rate=1e-3, groups=groups).build(model)
    ctx = Context(torch.zeros(1, TOKENS, dtype=torch.int64), torch.arange(TOKENS)[None])

    def update() -> None:
        gradient_values(model.parameters())
        optimizer.step()

    return stepper(model, lambda x: model(x[None], ctx).y[0], update, width)


class PlainPeer(nn.Module):
    """The paper with embedding tables: all k² candidate pairs, all chosen rows gathered."""

    def __init__(self, side: int, width: int):
        super().__init__()
        self.side = side
        self.query = nn.Linear(width, HEADS * QUERY, bias=False)
        self.norm = nn.LayerNorm(QUERY)
        self.keys = nn.Parameter(torch.randn(2, side, QUERY // 2) * (QUERY // 2) ** -0.5)
        self.down, self.up = (nn.Embedding(side * side, width, sparse=True) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        queries = self.norm(self.query(x).view(-1, HEADS, QUERY)).view(-1, HEADS, 2, QUERY // 2)
        scores, places = torch.einsum("thac,adc->thad", queries, self.keys).topk(CHOSEN, dim=-1)
        pairs = scores[:, :, 0, :, None] + scores[:, :, 1, None, :]
        numbers = places[:, :, 0, :, None] * self.side + places[:, :, 1, None, :]
        best, index = pairs.flatten(-2).topk(CHOSEN, dim=-1)
        ids = numbers.flatten(-2).gather(-1, index)
        hidden = F.gelu(torch.einsum("td,thkd->thk", x, self.down(ids))) * best.softmax(-1)
        return torch.einsum("thk,thkd->td", hidden, self.up(ids))


def plain(side: int, width: int) -> Step:
    """`PlainPeer` under SparseAdam (tables) and AdamW (the rest)."""
    model = PlainPeer(side, width)
    tables = [model.down.weight, model.up.weight]
    rest = [p for p in model.parameters() if all(p is not t for t in tables)]
    optimizers = torch.optim.SparseAdam(tables, lr=1e-3), torch.optim.AdamW(rest, lr=1e-3, fused=True)

    def update() -> None:
        for optimizer in optimizers:
            optimizer.step()

    return stepper(model, model, update, width)
