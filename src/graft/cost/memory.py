"""Memory of training, from a training step that is run without memory.

The step runs for real, forward, backward and update, on *fake* tensors: they have shapes, types and lifetimes, but no
bytes. So whatever a variant allocates is counted when it is alive, and nothing here knows any variant: autocast copies
of weights, activation checkpointing, the chunked loss, an optimizer's state and its temporaries.

Not seen: memory inside one operation, Python and the libraries themselves, and what the allocator wastes. With
``runtime.compile`` the real need is usually lower, because fused blocks keep less.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from graft.config.experiment import Experiment
from graft.cost.live_bytes import LiveBytes
from graft.data.batch import Batch
from graft.model import Model

AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class MemoryBytes:
    """Bytes of one training process.

    The parts need not be alive at the same time: without accumulation a gradient appears as the activations it was
    computed from go. ``total`` is the most that is alive at once, so it may be less than their sum.

    Args:
        weights: fp32 parameters.
        gradients: fp32 gradients, all of them.
        optimizer: the optimizer's state after its first update.
        activations: kept from the forward pass of one micro-batch for its backward pass, autocast's low-precision
            copies of the weights included.
        logits: most that the head and the loss hold beyond the activations during the forward pass.
        update: most that the optimizer's update holds for itself.
        total: predicted peak.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    update: int
    total: int


def _bytes_of(tensors: Any) -> int:
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]


def _fake_batch(experiment: Experiment) -> Batch:
    shape = (experiment.micro_batch_size, experiment.data.seq_len)
    ids_BT = torch.zeros(shape, dtype=torch.long)
    packed = getattr(experiment.data.packing, "document_mask", True)
    return Batch(
        input_ids_BT=ids_BT,
        targets_BT=torch.zeros(shape, dtype=torch.long),
        segment_ids_BT=torch.ones(shape, dtype=torch.long) if packed else None,
        positions_BT=None,
        num_targets=shape[0] * shape[1],
        num_bytes=0,
        sample_ids=(),
    )


class _FakeStep:
    """A training step on fake tensors, with the bytes alive at each of its borders."""

    def __init__(self, experiment: Experiment, vocab_size: int):
        self.experiment = experiment
        self.model = Model(experiment.model, vocab_size)
        self.model.set_runtime(
            activation_checkpointing=experiment.runtime.activation_checkpointing,
            kernels=experiment.runtime.kernels,
            loss_chunk_bytes=experiment.runtime.loss_chunk_bytes,
        )
        self.objective: Any = experiment.objective.build()
        self.optimizer: torch.optim.Optimizer = experiment.optimizer.build(self.model)
        self.parameters = list(self.model.parameters())
        self.batch = _fake_batch(experiment)
        self.features_end = 0

    def warm_up(self) -> None:
        """One update, so that the optimizer's state exists as it does from the second step on."""
        for parameter in self.parameters:
            parameter.grad = torch.empty_like(parameter)
        self.optimizer.step()

    def measure(self) -> MemoryBytes:
        """Runs the step and returns what it held."""
        accumulates = self.experiment.training.global_batch_size > self.experiment.micro_batch_size
        if not accumulates:
            self.optimizer.zero_grad(set_to_none=True)
        state = _optimizer_tensors(self.optimizer)
        weights, optimizer = _bytes_of(self.parameters), _bytes_of(state)
        gradients = sum(p.numel() * p.element_size() for p in self.parameters if p.requires_grad)
        with LiveBytes() as live:
            for tensor in [*self.parameters, *state, *(p.grad for p in self.parameters if p.grad is not None)]:
                live.ignore(tensor)
            activations, logits = self._forward_backward(live)
            # gradients of earlier micro-batches are alive all along, those of the only one are in the count
            held = gradients if accumulates else 0
            backward_peak = live.peak + held
            live.peak = before = live.live
            self.optimizer.step()
            update = live.peak - before
            update_peak = live.peak + held
        total = weights + optimizer + max(backward_peak, update_peak)
        return MemoryBytes(weights, gradients, optimizer, activations, logits, update, total)

    def _forward_backward(self, live: LiveBytes) -> tuple[int, int]:
        self._watch_features(live)
        dtype = AUTOCAST_DTYPES.get(self.experiment.precision)
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            terms = self.objective.loss(self.model, self.batch)
        logits = live.peak - self.features_end
        loss = terms.main + terms.aux
        del terms
        # what the loss keeps for the backward pass belongs to the logits
        loss.backward()
        return self.features_end, logits

    def _watch_features(self, live: LiveBytes) -> None:
        features = self.model.features

        def watched(*args: Any, **kwargs: Any) -> Any:
            out = features(*args, **kwargs)
            self.features_end = live.live
            live.peak = max(live.peak, live.live)
            return out

        object.__setattr__(self.model, "features", watched)


def training_memory(experiment: Experiment, vocab_size: int) -> MemoryBytes:
    """Predicted memory of training ``experiment`` in one process, nothing allocated.

    Args:
        experiment: the whole config; micro-batch, precision, optimizer and runtime all matter.
        vocab_size: rows of the embedding table, before padding.
    """
    with FakeTensorMode():
        step = _FakeStep(experiment, vocab_size)
        step.warm_up()
        return step.measure()
