"""Running out of memory, in words a person can act on."""

from __future__ import annotations

import re

import torch

from graft.config.experiment import Experiment
from graft.errors import ResourceError


def smaller_micro_batch(experiment: Experiment) -> int | None:
    """The next smaller micro-batch that divides the global batch; None when it is one sequence already."""
    total = experiment.training.global_batch_size
    divisors = (n for n in range(experiment.micro_batch_size - 1, 0, -1) if total % n == 0)
    return next(divisors, None)


def allocation_failed(error: BaseException) -> str | None:
    """What to say if ``error`` says that an allocation failed, else None.

    PyTorch raises `torch.OutOfMemoryError` on a GPU and a plain RuntimeError ("DefaultCPUAllocator: …") on a CPU.
    """
    text = str(error)
    if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "DefaultCPUAllocator" not in text:
        return None
    asked = re.search(r"[Tt]ried to allocate ([\d.]+ \w+)", text)
    return "out of memory" + (f" when {asked[1]} more were asked for" if asked else "")


def out_of_memory(error: BaseException, experiment: Experiment) -> ResourceError | None:
    """The error to show if ``error`` says that an allocation failed while training, else None."""
    problem = allocation_failed(error)
    if problem is None:
        return None
    smaller = smaller_micro_batch(experiment)
    fix = (
        f"set training.micro_batch_size: {smaller} (the global batch stays as it is)"
        if smaller is not None
        else "shorten data.seq_len or make the model smaller"
    )
    if experiment.runtime.activation_checkpointing == "none":
        fix += ", or runtime.activation_checkpointing: block"
    return ResourceError(
        f"{problem}, with micro-batches of {experiment.micro_batch_size} sequences of {experiment.data.seq_len} tokens",
        where="training.micro_batch_size",
        fix=f"{fix}; 'graft check' shows where memory goes",
    )
