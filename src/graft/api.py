"""The typed Python API behind the command line: ``graft.load``, ``graft.build``, ``graft.train``, ``graft.generate``.

Importing this module is cheap; torch and the rest are imported by the function that needs them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    import torch

    from graft.config.experiment import Experiment
    from graft.data.tokenizers.base import Tokenizer
    from graft.generation.engine import Generation
    from graft.generation.sampling import SamplingSettings
    from graft.model import Model
    from graft.training.run import Run

SAMPLE_PROMPT_TOKENS = 16
SAMPLE_NEW_TOKENS = 96


def load(path: str | Path, overrides: Sequence[str] = ()) -> Experiment:
    """Reads a config file.

    Args:
        path: YAML, JSON or TOML; ``presets/…`` also finds graft's own.
        overrides: changes in dotted form, ``model.hidden_size=256``.

    Raises:
        ConfigError: with every problem of the file and the overrides.
    """
    from graft.config.load import load_experiment

    return load_experiment(path, overrides)


def build(experiment: Experiment, *, device: torch.device | str = "cpu") -> Model:
    """The untrained model of an experiment; ``model(input_ids)`` gives logits.

    The vocabulary is ``model.vocab_size``, or the tokenizer's. A tokenizer that is trained on the data has to be
    trained first, where the model needs it: then the data is prepared (and kept in ``runtime.cache_dir``).

    Args:
        experiment: from `load`.
        device: where the weights go.

    Raises:
        ConfigError, DataError: as preparing the data may.
    """
    from graft.model import build_model

    vocab_size = experiment.model.vocab_size or _tokenizer(experiment).vocab_size
    model = build_model(experiment.model, vocab_size, seed=experiment.seed, device=device)
    if model.uses_tokenizer():
        model.use_tokenizer(_tokenizer(experiment))
    return model


def _tokenizer(experiment: Experiment) -> Tokenizer:
    from graft.data.prepare import prepare

    tokenizer = experiment.data.tokenizer.build()
    return tokenizer if tokenizer.trained else prepare(experiment).tokenizer


def train(
    experiment: Experiment,
    *,
    out: str | Path | None = None,
    resume: str | Path = "never",
    allow_data_change: bool = False,
    config_text: str | None = None,
    stream: TextIO | None = None,
) -> Run:
    """Trains, evaluates, samples and saves; everything about the run is in its directory.

    On the main thread SIGTERM and SIGINT finish the step, save and raise `Preempted`; a second one raises `Interrupted`
    at once. The handlers there were are put back.

    Args:
        experiment: from `load`.
        out: run directory; None = ``runtime.output_dir`` / the run's id.
        resume: ``never`` refuses a directory that holds a run; ``auto`` continues its newest valid checkpoint, or
            starts; or a checkpoint's folder.
        allow_data_change: continue although the data is not the checkpoint's.
        config_text: the config as a person wrote it, kept beside the resolved one.
        stream: where a person reads; None = stderr.

    Returns:
        The finished run: ``run.model`` (an ordinary module, in training mode, whose gradients are dense from now on),
        ``run.step``, ``run.best_loss``, ``run.last_evaluation``; ``run.marks`` says what is true of every number
        (``leaks_future``).

    Raises:
        Preempted, Interrupted, DivergedError, ResourceError, DataError, CheckpointError, ConfigError.
    """
    from graft.config.advice import warnings
    from graft.ops.row_gradients import mark_rows
    from graft.training.resume import parse_resume
    from graft.training.session import Options, train_run

    options = Options(
        out=None if out is None else Path(out),
        resume=parse_resume(str(resume)),
        allow_data_change=allow_data_change,
        config_text=config_text,
        advice=warnings(experiment),
        sampler=None if experiment.model.bidirectional else _sampler(experiment),
        stream=stream,
        finish=_report,
    )
    run = train_run(experiment, options)
    for parameter in run.parameters:
        mark_rows(parameter, False)  # for any optimizer that the caller may go on with
    return run


def _report(run_dir: Path) -> None:
    """The page of a run that just ended; counting is done again, for a resumed run may be scored on other text."""
    from graft.report import baselines
    from graft.report.page import write_report

    (run_dir / baselines.FILE).unlink(missing_ok=True)
    write_report(run_dir)


def _sampler(experiment: Experiment) -> Callable[[Run], list[str]]:
    """Continuations of nothing and of the first words of held-out rows, the same draws every time."""
    from graft.data.loader import validation_batches
    from graft.generation.engine import generate
    from graft.generation.sampling import SamplingSettings

    settings = SamplingSettings(temperature=0.8, top_k=40, seed=experiment.seed)
    length = max(1, min(SAMPLE_PROMPT_TOKENS, experiment.data.seq_len // 2))
    new_tokens = max(1, min(SAMPLE_NEW_TOKENS, experiment.data.seq_len - length))

    def sample(run: Run) -> list[str]:
        tokenizer = run.prepared.tokenizer
        rows_BT = next(iter(validation_batches(run.prepared, run.experiment))).input_ids_BT[:2, :length]
        prompts = [[tokenizer.end_of_document], *rows_BT.tolist()]
        made = generate(
            run.model,
            prompts,
            settings=settings,
            max_new_tokens=new_tokens,
            end_ids=(tokenizer.end_of_document,),
            vocab_size=tokenizer.vocab_size,
        )
        return [
            f"{tokenizer.decode(list(g.prompt_ids))} |> {tokenizer.decode(list(g.token_ids))}".strip() for g in made
        ]

    return sample


def generate(
    model: Model,
    prompts: Sequence[str] | Sequence[Sequence[int]] | torch.Tensor,
    *,
    tokenizer: Tokenizer | None = None,
    settings: SamplingSettings | None = None,
    max_new_tokens: int = 200,
    stop: Sequence[str] = (),
    on_text: Callable[[int, str], None] | None = None,
) -> list[Generation]:
    """Continues prompts with cached decoding, all of them as one batch.

    Args:
        model: from `build`, a finished run's ``run.model``, or `graft.training.load.load_run`.
        prompts: texts (each starts a document), or token ids used as they are: lists, or a tensor with a row for each.
        tokenizer: ``run.prepared.tokenizer``; text, stop strings and ``on_text`` need it, and with it a text ends at
            the end-of-document id. Without it only ids go in and come out.
        settings: how tokens are chosen; None = `SamplingSettings()`, plain sampling.
        max_new_tokens: most tokens added to each prompt.
        stop: strings that end a text.
        on_text: called with (prompt number, text) as text is written.

    Raises:
        ConfigError: something asked for needs a tokenizer, or a prompt cannot be continued.
    """
    from graft.errors import ConfigError
    from graft.generation import engine, text
    from graft.generation.sampling import SamplingSettings

    settings = settings or SamplingSettings()
    listed = _listed(prompts)
    if tokenizer is not None:
        return text.generate_text(
            model, tokenizer, listed, settings=settings, max_new_tokens=max_new_tokens, stop=stop, on_text=on_text
        )
    ids = [prompt for prompt in listed if not isinstance(prompt, str)]
    if len(ids) < len(listed) or stop or on_text is not None:
        raise ConfigError("text needs a tokenizer", where="graft.generate", fix="pass tokenizer=, or prompts of ids")
    return engine.generate(model, ids, settings=settings, max_new_tokens=max_new_tokens)


def _listed(prompts: Sequence[str] | Sequence[Sequence[int]] | torch.Tensor) -> list[str | list[int]]:
    """Texts, or ids as plain lists. Raises ConfigError for one prompt that stands by itself."""
    from graft.errors import ConfigError

    rows = list(prompts)
    if isinstance(prompts, str) or any(getattr(row, "ndim", 1) == 0 or isinstance(row, int) for row in rows):
        raise ConfigError("one prompt by itself", where="graft.generate", fix="give a list of prompts: [prompt]")
    return [row if isinstance(row, str) else [int(i) for i in row] for row in rows]
