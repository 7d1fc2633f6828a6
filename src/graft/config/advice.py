"""Advice about configs that are valid but probably not what was meant."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from graft.config.base import sub_configs
from graft.config.experiment import Experiment
from graft.config.families import PartConfig, TokenMixerConfig
from graft.config.model import ModelConfig
from graft.config.tree import dotted


def warnings(experiment: Experiment) -> list[str]:
    """One line of advice per oddity: ``field: what it means; what to do``. ``check`` and ``train`` print them."""
    return [
        *_leaks(experiment),
        *_windows(experiment),
        *_own_advice(experiment),
        *_schedule(experiment),
        *_steps(experiment),
        *_data(experiment),
        *_usage(experiment),
    ]


def marks(model: ModelConfig) -> dict[str, bool]:
    """What every number measured with the model is marked with: ``leaks_future: true``, or nothing.

    Whatever holds such numbers under their names holds the marks beside them (metric lines, events, checkpoints,
    ``--json``, `graft.training.run.Run.last_evaluation`, `graft.evals.perplexity.TextLoss`), and so do the names under
    which trackers get them; texts for people are `marked`.
    """
    return {"leaks_future": True} if model.leaks_future else {}


def marked(text: str, marks: Mapping[str, bool]) -> str:
    """``text`` that tells numbers of a model, or names one, with the model's `marks` behind it."""
    return "  ".join((text, *(f"({mark})" for mark in marks)))


LEAK = "the model reads the future: its losses are too good, and it cannot generate as it was trained"
"""What the mark ``leaks_future`` says to a person."""


def _leaks(experiment: Experiment) -> Iterator[str]:
    for part, name_of in _parts_in_use(experiment):
        if part.leaks_future(experiment.model.bidirectional):
            yield f"{name_of('type')}: {LEAK}; every metric is marked leaks_future"


def _windows(experiment: Experiment) -> Iterator[str]:
    seq_len = experiment.data.seq_len
    for part, name_of in _parts_in_use(experiment):
        window = getattr(part, "sliding_window", None)
        if window is not None and window >= seq_len:
            yield (
                f"{name_of('sliding_window')}: a window of {window} is not shorter than "
                f"data.seq_len {seq_len}, so training never slides; lower it or remove it"
            )


def _own_advice(experiment: Experiment) -> Iterator[str]:
    for part, name_of in _parts_in_use(experiment):
        for advice in part.advice_in(experiment.model.hidden_size):
            yield f"{name_of(dotted(advice.path))}: {advice.message}; {advice.fix}"


def _parts_in_use(experiment: Experiment) -> Iterator[tuple[PartConfig, Callable[[str], str]]]:
    """Each distinct part that is in a layer, and what one of its fields is called in a message."""
    named = {id(part): f"model.blocks.{name}.{i}" for name, i, part in _parts(experiment)}
    seen: set[int] = set()
    for layer, parts in enumerate(experiment.model.layers()):
        for part in parts:
            if id(part) not in seen:
                seen.add(id(part))
                # a part changed by an override has no place of its own in the file
                where = f"{named[id(part)]}.{{}}" if id(part) in named else f"model layer {layer}"
                yield from _with_inner(part, where)


def _with_inner(part: PartConfig, where: str) -> Iterator[tuple[PartConfig, Callable[[str], str]]]:
    """A part and the parts inside it; ``where`` is what its fields are called, {} for the field."""
    yield part, where.format
    for path, inner in sub_configs(part.__dict__):
        if isinstance(inner, PartConfig):
            yield from _with_inner(inner, where.replace("{}", f"{dotted(path)}.{{}}"))


def _parts(experiment: Experiment) -> Iterator[tuple[str, int, PartConfig]]:
    for name, parts in experiment.model.blocks.items():
        for i, part in enumerate(parts):
            yield name, i, part


def _schedule(experiment: Experiment) -> Iterator[str]:
    count = getattr(experiment.schedule, "num_warmup_steps", None)
    if count is None:
        return
    warmup: int = count(experiment.max_steps, experiment.tokens_per_step)
    kind = experiment.optimizer.tag
    if warmup == 0 and kind in ("adamw", "muon"):
        yield f"schedule: no warm-up with {kind}, whose first updates are its noisiest; set warmup_steps"
    if warmup == experiment.max_steps:
        yield f"schedule: the warm-up of {warmup} steps is the whole run, so the peak is only just reached; shorten it"


def _steps(experiment: Experiment) -> Iterator[str]:
    steps = experiment.max_steps
    max_tokens = experiment.training.max_tokens
    if max_tokens is not None and max_tokens % experiment.tokens_per_step:
        kept = steps * experiment.tokens_per_step
        yield f"training.max_tokens: {max_tokens} is rounded down to {kept} ({steps} steps)"
    for section in ("evaluation", "checkpoint"):
        interval = getattr(experiment, section).interval
        if interval is not None and interval > steps:
            yield f"{section}.interval: {interval} is more than the run's {steps} steps, so it never comes round"


def _data(experiment: Experiment) -> Iterator[str]:
    if experiment.model.bidirectional and not experiment.objective.supports_bidirectional:
        yield (
            f"objective: {experiment.objective.tag} does not train an encoder, which sees every target; this one can "
            "be built, priced and run forward"
        )
    embedding = experiment.model.embedding
    placeless = not any(_tells_order(part) for part, _ in _parts_in_use(experiment))
    if experiment.model.bidirectional and placeless and embedding.position is None and embedding.conv is None:
        yield "model: nothing tells positions apart in this encoder (a bag of words); give attention a position"


def _usage(experiment: Experiment) -> Iterator[str]:
    if any(part.counts_choices() for part, _ in _parts_in_use(experiment)):
        return
    for name in ("usage_interval", "usage_hot_threshold", "dead_after"):
        if getattr(experiment.logging, name) != type(experiment.logging).model_fields[name].default:
            yield f"logging.{name}: no part of the model counts what it chooses, so it says nothing; remove it"


def _tells_order(part: PartConfig) -> bool:
    """Whether a part's output depends on the order of tokens: it has positions, or mixes by distance without any."""
    if "position" in type(part).model_fields:
        return getattr(getattr(part, "position", None), "type", "none") != "none"
    if any(isinstance(inner, PartConfig) for _, inner in sub_configs(part.__dict__)):
        return False  # the parts inside are asked themselves
    return isinstance(part, TokenMixerConfig) and part.mixes_tokens
