"""One run from its config to its end: directory, data, model, resume, steps, and an honest last word in status.json."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from graft.config.experiment import Experiment
from graft.config.identity import resolved_yaml, run_id
from graft.data.loader import TrainLoader
from graft.data.prepare import prepare
from graft.errors import CheckpointError, DivergedError, GraftError, Interrupted, Preempted
from graft.model import build_model
from graft.network.kernels import kernels_in_use
from graft.optimizers.groups import describe_groups
from graft.training.checkpoint import CheckpointStore, Loaded
from graft.training.console import Console, short
from graft.training.hooks import CheckpointHook, EvaluateHook, Hook, LogHook, SampleHook, Sampler, UsageHook
from graft.training.loop import fit
from graft.training.memory import out_of_memory
from graft.training.metrics import EventsLog, MetricsLog
from graft.training.precision import Precision
from graft.training.recorder import Notices, Recorder
from graft.training.recovery import Recovery
from graft.training.resume import Resume, restore_run
from graft.training.rng import seed_everything
from graft.training.run import Run
from graft.training.run_dir import RunDirectory, RunState
from graft.training.runtime import RuntimeReport, configure_runtime, peak_flops, runtime_restored
from graft.training.saving import Checkpoints
from graft.training.signals import StopRequest
from graft.training.throughput import flops_per_token
from graft.training.trackers import open_trackers


@dataclass(frozen=True)
class Options:
    """How a run is started, beside its config.

    Args:
        out: run directory; None = ``runtime.output_dir / run_id(experiment)``.
        resume: see `graft.training.resume.Resume`.
        allow_data_change: continue on other data than the checkpoint's.
        config_text: the config as the person wrote it, kept in ``config.yaml``; None = the resolved one.
        advice: lines to show at the start (what is allowed in the config but probably not meant).
        sampler: makes the sample texts; None = no samples.
        stream: where a person reads; None = stderr.
        finish: called with the run directory of a finished run, when its status says so (writes the report).
    """

    out: Path | None = None
    resume: Resume = "never"
    allow_data_change: bool = False
    config_text: str | None = None
    advice: Sequence[str] = ()
    sampler: Sampler | None = None
    stream: TextIO | None = None
    finish: Callable[[Path], object] | None = None


def run_folder(experiment: Experiment, options: Options) -> Path:
    """Where the run is kept."""
    return options.out or Path(experiment.runtime.output_dir) / run_id(experiment)


def train_run(experiment: Experiment, options: Options) -> Run:
    """Trains until the end, or raises why not; ``status.json`` says the same as the exception.

    Raises:
        Preempted: asked to stop; saved, the same command resumes.
        Interrupted: a second signal; the last checkpoint is valid.
        DivergedError, ResourceError, DataError, CheckpointError, ConfigError: as their names say.
    """
    folder = run_folder(experiment, options)
    _refuse_existing(folder, options.resume)
    with RunDirectory.open(folder) as directory, runtime_restored():
        session = Session(experiment, options, directory)
        with session.outcome():
            run = session.train()
        if options.finish is not None:
            options.finish(folder)
        return run


def _refuse_existing(folder: Path, resume: Resume) -> None:
    """A directory that holds a run is never trained into by accident."""
    if resume != "never":
        return
    directory = RunDirectory(folder)
    status = directory.read_status()
    if not _came_to_a_step(directory) and (status is None or status.state != "running"):
        return
    how = f"{status.state} at step {status.step}" if status else "unfinished"
    raise CheckpointError(
        f"it already holds a run ({how})",
        where=str(folder),
        fix="pass --resume auto to continue it, --out to train elsewhere, or remove the folder",
    )


def _came_to_a_step(directory: RunDirectory) -> bool:
    """Whether the directory holds a run that has something to lose."""
    status = directory.read_status()
    return (status is not None and status.step > 0) or any(directory.checkpoints.glob("step-*"))


@dataclass
class Session:
    """What `train_run` holds open while a run trains.

    A directory that holds a run is *taken over* when it is certain that this command goes on with that run: its
    checkpoint is loaded and belongs to the config and the data, and steps are left. What is refused before leaves
    ``status.json`` to the run that wrote it; what fails later is that run's failure, and ``status.json`` says so.
    """

    experiment: Experiment
    options: Options
    directory: RunDirectory
    run: Run | None = field(default=None, init=False)
    notices: Notices = field(init=False)
    store: CheckpointStore = field(init=False)
    _step: int = field(default=0, init=False)
    """Where the run starts from."""
    _taken: bool = field(init=False)
    """Whether ``status.json`` is this session's to write."""

    def __post_init__(self) -> None:
        self._taken = not _came_to_a_step(self.directory)
        console = Console(self.directory.file("train.log"), self.options.stream)
        self.notices = Notices(EventsLog(self.directory.events), console)
        settings = self.experiment.checkpoint
        self.store = CheckpointStore(
            self.directory.checkpoints,
            keep_last=settings.keep_last,
            keep_best=settings.keep_best,
            report=self.notices.events.write,
        )

    # ------------------------------------------------------------------ the run

    def train(self) -> Run:
        """Everything between an open directory and a finished run."""
        runtime = configure_runtime(self.experiment.runtime, matmul_shape=_typical_matmul(self.experiment))
        self.store.sweep()
        loaded = self._find_checkpoint()
        if self._taken:
            self.directory.write_status("running", self._step, "preparing", resumable=loaded is not None)
        run = self.run = self._build(runtime)
        self._describe(run)
        if loaded is not None:
            restore_run(run, loaded, self.notices, allow_data_change=self.options.allow_data_change)
            if run.step > run.max_steps:
                self.notices.warn(run.step, f"the run ends at step {run.max_steps}: nothing is left to train")
            if self._finished(run):
                self.notices.console.say(f"the run is finished: restored from {loaded.path}")
                return run
            self._go_on_from(loaded)
        self._taken = True
        self._write_files(run, runtime)
        with self._recording(run) as recorder:
            self._fit(run, recorder)
        return run

    def _find_checkpoint(self) -> Loaded | None:
        resume = self.options.resume
        loaded = None if resume == "never" else self.store.load(resume)
        if loaded is None and resume == "auto":
            self.notices.console.say("there is no checkpoint to resume from: starting at step 0")
        self._step = 0 if loaded is None else loaded.step
        return loaded

    def _finished(self, run: Run) -> bool:
        """Whether the directory's run is done and the config asks for no more steps: there is nothing to take over."""
        status = self.directory.read_status()
        return status is not None and status.state == "done" and run.step >= run.max_steps

    def _write_files(self, run: Run, runtime: RuntimeReport) -> None:
        """What the directory says about the run; not before it is certain that the run goes on here."""
        resolved = resolved_yaml(self.experiment)
        self.directory.write_config(self.options.config_text or resolved, resolved)
        self.directory.write_environment(runtime.to_dict())
        run.prepared.tokenizer.save(self.directory.tokenizer)

    def _build(self, runtime: RuntimeReport) -> Run:
        experiment, device = self.experiment, runtime.device
        precision = Precision(experiment.precision, device)
        prepared = prepare(experiment)
        model = build_model(experiment.model, prepared.vocab_size, seed=experiment.seed, device=device)
        model.use_tokenizer(prepared.tokenizer)
        model.set_runtime(
            compile=experiment.runtime.compile,
            activation_checkpointing=experiment.runtime.activation_checkpointing,
            kernels=experiment.runtime.kernels,
            dtype=precision.dtype,
            loss_chunk_bytes=experiment.runtime.loss_chunk_bytes,
        )
        seed_everything(experiment.seed)
        loader = TrainLoader(prepared, experiment)
        return Run(
            experiment, model, prepared, loader, device=device, precision=precision, directory=self.directory.path
        )

    @contextmanager
    def _recording(self, run: Run) -> Iterator[Recorder]:
        """Opens the logs at the step the run continues after."""
        notices = self.notices
        trackers = open_trackers(self.experiment, self.directory.path, lambda text: notices.warn(self._step, text))
        metrics = MetricsLog(self.directory.metrics, resume_step=self._step or None)
        try:
            yield Recorder(notices.events, notices.console, metrics, trackers, run.marks)
        finally:
            trackers.close()
            metrics.close()

    def _go_on_from(self, loaded: Loaded) -> None:
        """What this directory has of steps later than ``loaded`` is set aside."""
        self.store.set_aside_after(loaded.step)
        self.notices.event("resumed", loaded.step, {"from": str(loaded.path)})
        self.notices.console.say(f"resumed at step {loaded.step} from {loaded.path}")

    def _fit(self, run: Run, recorder: Recorder) -> None:
        experiment = self.experiment
        checkpoints = Checkpoints(
            self.store,
            recorder,
            max_failed_saves=experiment.checkpoint.max_failed_saves,
            on_saved=lambda step: self.directory.write_status("running", step, resumable=True),
        )
        with StopRequest() as stop, self.notices.console as console:
            self.directory.write_status("running", run.step, resumable=checkpoints.any_valid())
            if run.step == 0:
                EvaluateHook(recorder).measure(run)  # the untrained model, to compare with
            console.start_progress(run.step, run.max_steps)
            fit(run, self._hooks(run, recorder, checkpoints), Recovery(checkpoints, recorder), stop)
            if run.step < run.max_steps:
                assert stop.reason is not None
                checkpoints.save(run, required=True)
                raise Preempted(
                    f"{stop.reason}: saved after step {run.step} of {run.max_steps}",
                    where=str(self.directory.path),
                    fix="run the same command with --resume auto to continue",
                )

    def _hooks(self, run: Run, recorder: Recorder, checkpoints: Checkpoints) -> list[Hook]:
        """In the order they act: the numbers of a step are logged and scored before the step is saved."""
        log = LogHook(
            recorder,
            flops_per_token=flops_per_token(run.model, run.experiment.data.seq_len),
            peak_flops=peak_flops(run.device, run.precision.dtype),
        )
        hooks: list[Hook] = [log, UsageHook(recorder), EvaluateHook(recorder), CheckpointHook(checkpoints)]
        if self.options.sampler is not None:
            hooks.append(SampleHook(recorder, self.options.sampler))
        return hooks

    def _describe(self, run: Run) -> None:
        """What is about to be trained, on what, updated how."""
        say, tokens = self.notices.console.say, self.experiment.tokens_per_step
        say(f"run directory {self.directory.path}")
        say(f"{short(run.model.num_parameters())} parameters, {run.max_steps} steps of {tokens} tokens")
        say(f"data fingerprint {run.prepared.fingerprint}, vocabulary {run.prepared.vocab_size}")
        kernels = kernels_in_use(run.model.parts())
        say("kernels: " + ", ".join(f"{part} {kernel}" for part, kernel in kernels.items()))
        self.notices.event("kernels", run.step, {"parts": kernels})
        for row in describe_groups(run.optimizer):
            say(
                f"  {row.role:<14} {row.algorithm:<15} {row.num_tensors:>5} tensors {short(row.num_parameters):>7} "
                f"parameters  lr x {row.lr_multiplier:g}  weight decay {row.weight_decay:g}"
            )
        for line in (*self.options.advice, *run.prepared.warnings):
            self.notices.console.warn(line)

    # ------------------------------------------------------------------ how it ends

    @contextmanager
    def outcome(self) -> Iterator[None]:
        """Writes how the run ended, whatever happens; turns what the machine says into what a person can use."""
        bridge = _WarningsTo(self.notices.console)
        logging.getLogger("graft").addHandler(bridge)
        try:
            yield
            assert self.run is not None
            self._end("done", "", resumable=False, code=0)
        except KeyboardInterrupt as error:
            self._end("interrupted", str(error), resumable=self._resumable(), code=Interrupted.exit_code)
            raise Interrupted("interrupted; the last checkpoint is valid", where=str(self.directory.path)) from error
        except GraftError as error:
            self._end(_state(error), str(error), resumable=self._may_continue(error), code=error.exit_code)
            raise
        except Exception as error:
            known = out_of_memory(error, self.experiment)
            code = GraftError.exit_code if known is None else known.exit_code
            reason = f"{type(error).__name__}: {error}" if known is None else str(known)
            self._end("failed", reason, resumable=self._resumable(), code=code)
            if known is None:
                raise
            raise known from error
        finally:
            logging.getLogger("graft").removeHandler(bridge)
            if self.run is not None:
                self.run.loader.close()
            self.notices.events.close()

    def _end(self, state: RunState, reason: str, *, resumable: bool, code: int) -> None:
        if not self._taken and self._status_still_true():
            if reason:
                self.notices.event("refused", self._step, {"reason": reason})
            return
        step = self.run.step if self.run is not None and self.run.step else self._step
        self.notices.event("ended", step, {"state": state, "reason": reason})
        self.directory.write_status(state, step, reason, resumable=resumable, exit_code=int(code))

    def _status_still_true(self) -> bool:
        """False when the directory says that its run can be continued, and looking for a checkpoint found none."""
        status = self.directory.read_status()
        return status is None or not status.resumable or self._resumable()

    def _resumable(self) -> bool:
        return self.store.latest() is not None

    def _may_continue(self, error: GraftError) -> bool:
        """A diverged run would diverge again: the same command is no way on."""
        return not isinstance(error, DivergedError) and self._resumable()


def _typical_matmul(experiment: Experiment) -> tuple[int, int, int]:
    """Rows, inner size and columns of a product as the run will make most of: a feed-forward's, roughly."""
    hidden_size = experiment.model.hidden_size
    return experiment.micro_batch_size * experiment.data.seq_len, hidden_size, 4 * hidden_size


def _state(error: GraftError) -> RunState:
    if isinstance(error, Preempted):
        return "preempted"
    return "diverged" if isinstance(error, DivergedError) else "failed"


class _WarningsTo(logging.Handler):
    """Warnings of graft's modules reach the person and ``train.log``."""

    def __init__(self, console: Console):
        super().__init__(logging.WARNING)
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        self._console.warn(record.getMessage())
