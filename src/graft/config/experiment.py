"""The root of a config file. ``model, objective, optimizer, schedule, data, training, precision, seed`` say *what* is
computed and make up the run's identity; everything else says how it runs, what is watched and where it is kept."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from graft.config.base import Config, Problem, knob
from graft.config.families import Objective, Optimizer, Packing, Schedule, Source, Tokenizer
from graft.config.model import ModelConfig

SEMANTIC_FIELDS = ("model", "objective", "optimizer", "schedule", "data", "training", "precision", "seed")
"""Fields that decide the numbers; a run's id hashes these and nothing else."""


class ValidationConfig(Config):
    """Which documents are held out."""

    fraction: float | None = knob(
        None, "share of documents (or of a single document's end) held out; null = source decides", gt=0.0, lt=1.0
    )
    source: Source | None = knob(None, "a separate source of held-out documents")

    def problems(self) -> Iterator[Problem]:
        if self.fraction is not None and self.source is not None:
            yield Problem(("fraction",), "both fraction and source are given", "keep one")


class DataConfig(Config):
    """Text, tokens and rows."""

    source: Source = knob(doc="where documents come from")
    validation: ValidationConfig = knob(doc="held-out documents", factory=ValidationConfig)
    tokenizer: Tokenizer = knob(doc="how text becomes ids")
    seq_len: int = knob(doc="training length in tokens (T)", ge=2)
    packing: Packing | None = knob(None, "how documents fill rows; null = {type: concat}")
    max_bad_rows: int = knob(
        0, "rows of the source that may be unusable (skipped, counted by cause) before it is an error", ge=0
    )


class GuardConfig(Config):
    """What happens when numbers go wrong."""

    max_consecutive_bad_steps: int = knob(
        3, "steps in a row with non-finite loss or gradient before rolling back to the last good checkpoint", ge=1
    )
    max_rollbacks: int = knob(1, "rollbacks before the run stops as diverged (exit 5)", ge=0)


class TrainingConfig(Config):
    """How long, with how much at once. A step is one optimizer update."""

    max_steps: int | None = knob(None, "optimizer updates; exactly one of max_steps and max_tokens", ge=1)
    max_tokens: int | None = knob(None, "training tokens, rounded down to whole steps", ge=1)
    global_batch_size: int = knob(doc="sequences per step", ge=1)
    micro_batch_size: int | None = knob(None, "sequences per forward pass; null = global_batch_size", ge=1)
    max_grad_norm: float | None = knob(1.0, "gradients are scaled down to this global norm; null = no clipping", gt=0.0)
    guard: GuardConfig = knob(doc="non-finite losses and gradients", factory=GuardConfig)

    def problems(self) -> Iterator[Problem]:
        if (self.max_steps is None) == (self.max_tokens is None):
            given = "both" if self.max_steps is not None else "neither"
            yield Problem(("max_steps",), f"{given} of max_steps and max_tokens given", "give exactly one")
        micro = self.micro_batch_size
        if micro is not None and self.global_batch_size % micro:
            yield Problem(
                ("micro_batch_size",),
                f"global_batch_size {self.global_batch_size} is no multiple of micro_batch_size {micro}",
                "choose a divisor",
            )


class EvaluationConfig(Config):
    """Loss on the fixed held-out set while training."""

    interval: int | None = knob(None, "steps between evaluations; null = only at the end", ge=1)
    max_sequences: int = knob(256, "held-out sequences per evaluation (the same ones each time)", ge=1)
    batch_size: int | None = knob(None, "sequences per forward pass; null = the training micro-batch", ge=1)


class CheckpointConfig(Config):
    """When state is saved and what is kept. The last step is always saved."""

    interval: int | None = knob(None, "steps between saves; null = only at the end and when asked to stop", ge=1)
    keep_last: int = knob(2, "valid checkpoints kept, newest first", ge=1)
    keep_best: int = knob(1, "checkpoints kept by lowest held-out loss, beside the newest", ge=0)
    max_failed_saves: int = knob(3, "saves in a row that may fail (disk full) before the run stops (exit 6)", ge=1)


class WandbConfig(Config):
    """Weights & Biases; ``mode: offline`` needs no account."""

    project: str = knob("graft", "project name")
    entity: str | None = knob(None, "user or team; null = the default of the login")
    group: str | None = knob(None, "group name")
    tags: tuple[str, ...] = knob((), "tags")
    mode: Literal["online", "offline"] = knob("offline", "offline keeps the run in the run directory")


class LoggingConfig(Config):
    """``metrics.jsonl`` is always written; the rest is optional."""

    interval: int = knob(10, "steps between metric lines", ge=1)
    tensorboard: bool = knob(False, "write TensorBoard events (extra: track)")
    wandb: WandbConfig | None = knob(None, "Weights & Biases settings; null = off (extra: track)")
    samples_interval: int | None = knob(None, "steps between printed samples; null = only at the end", ge=1)
    usage_interval: int | None = knob(
        100, "steps between lines on what was chosen, for models that choose (experts); null = only at the end", ge=1
    )
    usage_hot_threshold: float = knob(5.0, "times the mean above which an expert counts as hot", gt=0.0)
    dead_after: int = knob(100, "steps without being chosen after which an expert counts as dead", ge=1)


class RuntimeConfig(Config):
    """How the same numbers are computed: changing these never changes a run's id."""

    device: str = knob("auto", "auto | cpu | cuda | cuda:N | mps", pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")
    compile: bool = knob(False, "torch.compile each block (needs a C++ compiler); pays off after about a minute")
    activation_checkpointing: Literal["none", "block"] = knob(
        "none", "block: recompute each layer in the backward pass"
    )
    kernels: Literal["auto", "reference", "fla", "mamba_ssm", "flex"] = knob(
        "auto",
        "auto: another package's kernel where one is installed and fits (CUDA), else graft's fastest form; reference: "
        "the plain form of every operation; a kernel's name: that one, or an error saying why not",
    )
    fp32_matmul: Literal["auto", "default", "onednn"] = knob(
        "auto", "auto: probe whether oneDNN's fp32 matmul is faster and still exact (error < 2e-6), then use it"
    )
    threads: int | None = knob(None, "CPU threads; null = PyTorch's choice", ge=1)
    tune_allocator: bool = knob(True, "glibc: keep freed memory mapped (fewer page faults)")
    loss_chunk_bytes: int = knob(
        256 * 2**20, "logits are computed in chunks of at most this many bytes of fp32", ge=2**16
    )
    data_workers: int = knob(0, "processes that prepare batches ahead; 0 = in the training process", ge=0)
    deterministic: bool = knob(False, "torch.use_deterministic_algorithms")
    output_dir: str = knob("runs", "run directories are made below this folder")
    cache_dir: str = knob(".graft_cache", "tokenised shards and trained tokenizers")


class Experiment(Config):
    """Everything in one config file."""

    name: str = knob("run", "first part of the run's id; letters, digits, '.', '_' and '-'", pattern=r"^[\w.\-]{1,80}$")
    model: ModelConfig = knob(doc="the network")
    objective: Objective = knob(doc="what is predicted")
    data: DataConfig = knob(doc="text, tokens and rows")
    optimizer: Optimizer = knob(doc="how gradients become updates")
    schedule: Schedule = knob(doc="learning rate over steps")
    training: TrainingConfig = knob(doc="how long and how much at once")
    precision: Literal["fp32", "bf16", "fp16"] = knob(
        "fp32", "bf16 and fp16 keep fp32 master weights and autocast the matrix work; fp16 scales the loss"
    )
    seed: int = knob(0, "seeds weights, data order and dropout", ge=0, lt=2**31)
    evaluation: EvaluationConfig = knob(doc="held-out loss", factory=EvaluationConfig)
    checkpoint: CheckpointConfig = knob(doc="what is saved", factory=CheckpointConfig)
    logging: LoggingConfig = knob(doc="what is reported", factory=LoggingConfig)
    runtime: RuntimeConfig = knob(doc="how it runs", factory=RuntimeConfig)
    plugins: tuple[str, ...] = knob((), "modules to import that register variants of your own")

    @property
    def micro_batch_size(self) -> int:
        """Sequences per forward pass."""
        return self.training.micro_batch_size or self.training.global_batch_size

    @property
    def tokens_per_step(self) -> int:
        """Training positions per optimizer update."""
        return self.training.global_batch_size * self.data.seq_len

    @property
    def max_steps(self) -> int:
        """Optimizer updates in the whole run."""
        if self.training.max_steps is not None:
            return self.training.max_steps
        assert self.training.max_tokens is not None
        return self.training.max_tokens // self.tokens_per_step

    def problems(self) -> Iterator[Problem]:
        if self.max_steps < 1:
            yield Problem(
                ("training", "max_tokens"),
                f"max_tokens {self.training.max_tokens} is less than one step of {self.tokens_per_step} tokens",
                "raise max_tokens, or lower global_batch_size or data.seq_len",
            )
        else:
            yield from self._schedule_problems()
        yield from self._length_problems()

    def _schedule_problems(self) -> Iterator[Problem]:
        for problem in self.schedule.problems_for(self.max_steps, self.tokens_per_step):
            yield Problem(("schedule", *problem.path), problem.message, problem.fix)

    def _length_problems(self) -> Iterator[Problem]:
        position = self.model.embedding.position
        limit = getattr(position, "max_seq_len", None)
        if limit is not None and self.data.seq_len > limit:
            yield Problem(
                ("data", "seq_len"),
                f"seq_len {self.data.seq_len} exceeds the {limit} learned positions",
                "lower data.seq_len, or raise model.embedding.position.max_seq_len",
            )
