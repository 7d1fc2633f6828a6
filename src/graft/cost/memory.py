"""Memory of training, from training steps that are run without memory.

The steps run for real, forward, backward and update, on *fake* tensors: they have shapes, types and lifetimes, but no
bytes. So whatever a variant allocates is counted while it is alive, and nothing here knows any variant: autocast copies
of weights, activation checkpointing, the chunked loss, an optimizer's state and its temporaries. On a CPU with glibc a
model of its heap (`graft.cost.heap`) adds what is typically lost between the tensors.

Not seen: memory inside one operation, Python and the libraries themselves. With ``runtime.compile`` the real need is
usually lower, because fused blocks keep less.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from graft.config.experiment import Experiment
from graft.cost.heap import GlibcHeap
from graft.cost.live_bytes import LiveBytes, stored
from graft.data.batch import Batch
from graft.model import Model
from graft.objectives.base import LossTerms, Objective, plain_cross_entropy
from graft.ops.row_gradients import rows_only, split_rows, summed_rows, wants_rows
from graft.training.precision import AUTOCAST_DTYPES
from graft.training.runtime import resolve_device

STEPS = 2
"""Steps rehearsed: the first makes the optimizer's state, the second finds it there."""

SCRATCH = 16 * 2**20
"""Bytes of buffers inside matrix products and of the autograd graph's own objects; measured on small runs."""


@dataclass(frozen=True)
class MemoryBytes:
    """Bytes of one training process.

    The parts need not be alive at the same time: without accumulation a gradient appears as the activations it was
    computed from go. ``total`` is the most that is alive at once, so it may be less than their sum.

    Args:
        weights: fp32 parameters.
        gradients: fp32 gradients, all of them; of tables with row-wise updates, the most rows a step can touch.
        optimizer: the optimizer's state after its first update.
        activations: kept from the forward pass of one micro-batch for its backward pass, autocast's low-precision
            copies of the weights included.
        logits: most that the head and the loss hold beyond the activations during the forward pass.
        update: most that the optimizer's update holds for itself.
        scratch: `SCRATCH` on a CPU, else 0.
        heap: what glibc's heap is expected to lose between tensors, where it is used. A typical figure: the real loss
            differs between repetitions of the same run, because small objects decide which holes can be reused.
        total: predicted peak.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    update: int
    scratch: int
    heap: int
    total: int


def _bytes_of(tensors: Iterable[Tensor]) -> int:
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def _fake_batch(experiment: Experiment) -> Batch:
    shape = (experiment.micro_batch_size, experiment.data.seq_len)
    packed = getattr(experiment.data.packing, "document_mask", True)
    return Batch(
        input_ids_BT=torch.zeros(shape, dtype=torch.long),
        targets_BT=torch.zeros(shape, dtype=torch.long),
        segment_ids_BT=torch.ones(shape, dtype=torch.long) if packed else None,
        positions_BT=None,
        num_targets=shape[0] * shape[1],
        num_bytes=0,
        sample_ids=(),
    )


class _RowGradient:
    """Keeps a table's row gradient as autograd does with real tensors; of a fake one it forgets the rows.

    Args:
        table: whose gradient holds rows only.
    """

    def __init__(self, table: Tensor):
        self._table = table
        self._sum: Tensor | None = None
        table.register_hook(self._add)

    def _add(self, gradient: Tensor) -> None:
        self._table.grad = None  # what autograd makes of it
        if self._sum is None:
            self._sum = rows_only(*split_rows(gradient), len(gradient))
        else:
            both = zip(split_rows(self._sum), split_rows(gradient), strict=True)
            rows, values = (torch.cat(pair) for pair in both)
            self._sum = summed_rows(rows_only(rows, values, len(gradient)))

    def hand_over(self) -> None:
        """Makes the sum of the micro-batches the table's gradient."""
        self._table.grad, self._sum = self._sum, None


class _Rehearsal:
    """Training steps on fake tensors; reads ``live`` at their borders."""

    def __init__(self, experiment: Experiment, vocab_size: int, live: LiveBytes):
        self.experiment = experiment
        self.live = live
        self.model = Model(experiment.model, vocab_size)
        self.model.set_runtime(
            activation_checkpointing=experiment.runtime.activation_checkpointing,
            kernels=experiment.runtime.kernels,
            loss_chunk_bytes=experiment.runtime.loss_chunk_bytes,
        )
        refused = experiment.model.bidirectional and not experiment.objective.supports_bidirectional
        objective: Objective = experiment.objective.build()
        self.loss: Callable[[Model, Batch], LossTerms] = plain_cross_entropy if refused else objective.loss
        self.optimizer: torch.optim.Optimizer = experiment.optimizer.build(self.model)
        self.batch = _fake_batch(experiment)
        self.gradients = self.activations = self.logits = self.update = self._before = 0
        self._watch_features()
        self._row_gradients = [_RowGradient(p) for p in self.model.parameters() if wants_rows(p)]

    def step(self) -> None:
        """One update, with a second micro-batch if there are several (its gradients meet those of the first)."""
        accumulates = self.experiment.training.global_batch_size > self.experiment.micro_batch_size
        for _ in range(2 if accumulates else 1):
            self._forward_backward()
        for rows in self._row_gradients:
            rows.hand_over()
        self.gradients = _bytes_of(t for p in self.model.parameters() if p.grad is not None for t in stored(p.grad))
        before = self.live.open_window()
        self.optimizer.step()
        self.update = self.live.window_peak - before
        self.optimizer.zero_grad(set_to_none=True)

    def _forward_backward(self) -> None:
        self._before = self.live.live
        dtype = torch.float32 if self.experiment.precision == "fp32" else AUTOCAST_DTYPES[self.experiment.precision]
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            terms = self.loss(self.model, self.batch)
        self.logits = self.live.window_peak - self._before - self.activations
        (terms.main / self.batch.num_targets + terms.aux / self.batch.num_positions).backward()

    def _watch_features(self) -> None:
        """Notes what is alive between the network and its head."""
        features = self.model.features

        def watched(*args: Any, **kwargs: Any) -> Any:
            out = features(*args, **kwargs)
            self.activations = self.live.open_window() - self._before
            return out

        object.__setattr__(self.model, "features", watched)

    def weights(self) -> int:
        """Bytes of the parameters."""
        return _bytes_of(self.model.parameters())

    def optimizer_state(self) -> int:
        """Bytes of what the optimizer keeps."""
        states = self.optimizer.state.values()
        return _bytes_of(value for state in states for value in state.values() if isinstance(value, Tensor))


def training_memory(experiment: Experiment, vocab_size: int) -> MemoryBytes:
    """Predicted memory of training ``experiment`` in one process, nothing allocated.

    Args:
        experiment: the whole config; micro-batch, precision, optimizer and runtime all matter.
        vocab_size: rows of the embedding table, before padding.
    """
    heap = GlibcHeap()
    with FakeTensorMode(), LiveBytes(heap) as live:
        rehearsal = _Rehearsal(experiment, vocab_size, live)
        for _ in range(STEPS):
            rehearsal.step()
        weights = rehearsal.weights()
        on_cpu = resolve_device(experiment.runtime.device).type == "cpu"
        scratch = SCRATCH if on_cpu else 0
        lost = max(0, heap.peak - live.peak) if on_cpu and platform.libc_ver()[0] == "glibc" else 0
        return MemoryBytes(
            weights=weights,
            gradients=rehearsal.gradients,
            optimizer=rehearsal.optimizer_state(),
            activations=rehearsal.activations,
            logits=rehearsal.logits,
            update=rehearsal.update,
            scratch=scratch,
            heap=lost,
            total=live.peak + scratch + lost,
        )
