"""A run as one HTML page that needs nothing beside itself: no network, no scripts, no account."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from graft.config.advice import LEAK, marked, marks
from graft.config.experiment import Experiment
from graft.config.load import load_experiment
from graft.errors import CheckpointError
from graft.report.baselines import baselines_of
from graft.report.charts import bar_chart, line_chart
from graft.report.usage import usage_section
from graft.training.metrics import read_lines

FILE = "report.html"
THIS_RUN, UNTRAINED = "this run", "untrained"

STYLE = """
:root{color-scheme:light dark;--ink:#1c1e21;--soft:#667;--paper:#fff;--line:#dde;--a:#2563eb;--b:#dc6803;--c:#059669;--d:#9333ea}
@media(prefers-color-scheme:dark){:root{--ink:#e6e6ea;--soft:#99a;--paper:#16171a;--line:#333842;--a:#6ea0ff;--b:#ffa657;--c:#4ade80;--d:#c084fc}}
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--paper);max-width:780px;margin:2rem auto;padding:0 1rem}
h1{font-size:1.5rem;margin-bottom:0}h2{font-size:1.1rem;margin-top:2.2rem}p.sub{color:var(--soft);margin-top:.2rem}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(130px,1fr));gap:.6rem}
.card{border:1px solid var(--line);border-radius:8px;padding:.5rem .7rem}.card b{display:block;font-size:1.15rem}.card span{color:var(--soft);font-size:.8rem}
svg{width:100%;height:auto}svg text{font-size:12px;fill:var(--soft)}.grid{stroke:var(--line)}.level{stroke:var(--soft);stroke-dasharray:4 4}
.line{fill:none;stroke-width:1.8}.line.a{stroke:var(--a)}.line.b{stroke:var(--b)}.line.c{stroke:var(--c)}.line.d{stroke:var(--d)}
.line.ramp{stroke:hsl(var(--hue) 65% 50%)}.key.ramp::before{background:hsl(var(--hue) 65% 50%)}
table{border-collapse:collapse;font-size:.85rem}td,th{padding:.15rem .6rem;text-align:right}td:first-child{text-align:left}
.bar.a{fill:var(--a)}.bar.other{fill:var(--line)}
.keys{font-size:.85rem}.key{margin-right:1rem}.key::before{content:"";display:inline-block;width:.8em;height:.8em;border-radius:2px;margin-right:.35em}
.key.a::before{background:var(--a)}.key.b::before{background:var(--b)}.key.c::before{background:var(--c)}.key.d::before{background:var(--d)}
pre{white-space:pre-wrap;overflow-wrap:anywhere;border:1px solid var(--line);border-radius:8px;padding:.7rem;font-size:.82rem}
summary{cursor:pointer}
"""  # noqa: E501


@dataclass(frozen=True)
class RunRecord:
    """Everything a run directory says about its run.

    Args:
        path: the run directory.
        experiment: its config.
        status: ``status.json``.
        environment: ``env.json``.
        lines: metric lines.
        events: event lines.
    """

    path: Path
    experiment: Experiment
    status: dict[str, Any]
    environment: dict[str, Any]
    lines: list[dict[str, Any]]
    events: list[dict[str, Any]]

    @classmethod
    def read(cls, path: Path) -> RunRecord:
        """Reads a run directory. Raises CheckpointError when it is none."""
        config = path / "config.resolved.yaml"
        if not config.exists():
            raise CheckpointError("it holds no run", where=str(path), expected="a folder that 'graft train' made")
        return cls(
            path,
            load_experiment(config),
            _read_json(path / "status.json"),
            _read_json(path / "env.json"),
            read_lines(path / "metrics.jsonl"),
            read_lines(path / "events.jsonl"),
        )

    @property
    def marks(self) -> dict[str, bool]:
        """What is true of every number measured with the model (`graft.config.advice.marks`)."""
        return marks(self.experiment.model)

    def points(self, kind: str, field: str) -> list[tuple[float, float]]:
        """(step, value) of every line of a kind that has the field; ``time.x`` looks into the line's time."""
        *outer, name = field.split(".")
        found = []
        for line in self.lines:
            table = line.get(outer[0], {}) if outer else line
            if line.get("kind") == kind and isinstance(table.get(name), int | float):
                found.append((float(line["step"]), float(table[name])))
        return found

    def last(self, kind: str, field: str) -> float | None:
        """The field's value in the last line that has it."""
        points = self.points(kind, field)
        return points[-1][1] if points else None


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object, empty where there is no file. Raises CheckpointError when it is damaged."""
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError as error:
        found, why = None, str(error)
    else:
        why = "it is no object"
    if not isinstance(found, dict):
        raise CheckpointError(f"no JSON can be read: {why}", where=str(path), fix="remove the file, or restore it")
    return found


def comparison(record: RunRecord) -> dict[str, float]:
    """Bits per byte on the held-out rows: this run's best, the untrained model's, and counting's."""
    scores = dict(record.points("eval", "bpb"))
    bars = baselines_of(record.path, record.experiment)
    if 0 in scores:
        bars[UNTRAINED] = scores.pop(0)
    if scores:
        bars[THIS_RUN] = min(scores.values())
    return bars


def comparison_lines(scores: Mapping[str, float], marks: Mapping[str, bool]) -> list[str]:
    """`comparison` to read in a terminal, best first; what was measured with the model is marked."""
    ranked = sorted(scores.items(), key=lambda item: item[1])
    return [f"{bpb:8.4f} bits per byte  {_marked_bar(name, marks)}" for name, bpb in ranked]


def _marked_bar(name: str, marks: Mapping[str, bool]) -> str:
    """A name of `comparison`, marked where its score is the model's and not counting's."""
    return marked(name, marks) if name in (THIS_RUN, UNTRAINED) else name


def _cards(cards: Mapping[str, str | None]) -> str:
    shown = "".join(
        f'<div class="card"><b>{escape(v)}</b><span>{escape(k)}</span></div>' for k, v in cards.items() if v is not None
    )
    return f'<div class="cards">{shown}</div>'


def _format(value: float | None, pattern: str = "{:.4f}") -> str | None:
    return None if value is None else pattern.format(value)


def _headline(record: RunRecord) -> str:
    seconds = record.last("train", "time.seconds")
    scores = {
        "held-out bits per byte": _format(record.last("eval", "bpb")),
        "held-out loss (nats per token)": _format(record.last("eval", "loss")),
        "held-out perplexity": _format(record.last("eval", "perplexity"), "{:,.2f}"),
    }
    return _cards(
        {
            **{marked(name, record.marks): score for name, score in scores.items()},
            "steps": _format(record.last("train", "step"), "{:,.0f}"),
            "tokens": _format(record.last("train", "tokens"), "{:,.0f}"),
            "tokens per second": _format(record.last("train", "time.tokens_per_second"), "{:,.0f}"),
            "seconds of training": _format(seconds, "{:,.0f}"),
            "skipped steps": _format(record.last("train", "skipped_steps"), "{:,.0f}"),
        }
    )


def _section(title: str, body: str) -> str:
    return f"<h2>{escape(title)}</h2>{body}" if body else ""


def _folded(title: str, text: str) -> str:
    return f"<details><summary>{escape(title)}</summary><pre>{escape(text)}</pre></details>"


def _samples(events: Iterable[Mapping[str, Any]]) -> str:
    texts: list[str] = []
    for event in events:
        texts = event.get("texts", texts) if event.get("event") == "samples" else texts
    return "".join(f"<pre>{escape(text)}</pre>" for text in texts)


def _incidents(events: Iterable[Mapping[str, Any]]) -> str:
    """What went wrong or was unusual, as it was written down."""
    routine = {"samples", "saved", "ended"}
    told = [json.dumps(dict(e), ensure_ascii=False) for e in events if e.get("event") not in routine]
    return f"<pre>{escape(chr(10).join(told))}</pre>" if told else ""


def render(record: RunRecord) -> str:
    """The page."""
    bars = comparison(record)
    levels = {name: value for name, value in bars.items() if name not in (THIS_RUN, UNTRAINED)}
    held_out = [p for p in record.points("eval", "bpb") if p[0] > 0]
    scores = {"training": record.points("train", "bpb"), "held out": held_out}
    curves = line_chart({marked(what, record.marks): score for what, score in scores.items()}, levels=levels)
    name, state = record.experiment.name, str(record.status.get("state", "unknown"))
    reason = record.status.get("reason") or ""
    body = [
        f"<h1>{escape(name)}</h1>",
        f'<p class="sub">{escape(record.path.name)} · {escape(state)}{" · " + escape(reason) if reason else ""}</p>',
        f"<p><b>{escape(LEAK)}.</b></p>" if record.marks else "",
        _headline(record),
        _section("Against counting: bits per byte on the held-out text", _bars(bars, record.marks)),
        _section("Bits per byte over steps", curves),
        _section("Learning rate", line_chart({"learning rate": record.points("train", "learning_rate")})),
        _section("Gradient norm before clipping", line_chart({"gradient norm": record.points("train", "grad_norm")})),
        _section("What is chosen", usage_section(record.lines)),
        _section("Samples", _samples(record.events)),
        _section("Incidents", _incidents(record.events)),
        "<h2>How it was made</h2>",
        _folded("config", (record.path / "config.resolved.yaml").read_text()),
        _folded("environment", json.dumps(record.environment, indent=1)),
    ]
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(name)}</title>'
    return (
        f"<!doctype html><html lang=en><head>{head}<style>{STYLE}</style></head><body>{''.join(body)}</body></html>\n"
    )


def _bars(bars: Mapping[str, float], marks: Mapping[str, bool]) -> str:
    if THIS_RUN not in bars:
        return ""
    named = {_marked_bar(name, marks): bpb for name, bpb in bars.items()}
    return bar_chart(named, highlight=_marked_bar(THIS_RUN, marks), unit="bpb")


def write_report(run_dir: Path | str) -> Path:
    """Writes ``report.html`` into a run directory and returns its path.

    Raises:
        CheckpointError: the folder holds no run.
    """
    record = RunRecord.read(Path(run_dir))
    path = record.path / FILE
    path.write_text(render(record), encoding="utf-8")
    return path
