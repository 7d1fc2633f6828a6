"""What happens when numbers go wrong: no update from a non-finite loss or gradient, and a diagnosis if it lasts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from graft.config.experiment import GuardConfig
from graft.data.batch import Batch
from graft.training.gradients import gradient_values
from graft.training.totals import Totals

if TYPE_CHECKING:
    from graft.training.run import Run  # which has a guard


class Verdict(Enum):
    """What a step's loss and gradient were."""

    GOOD = "good"
    NOT_FINITE = "not finite"
    SCALE_TOO_LARGE = "loss scale too large"


class Guard:
    """Judges every step before anything is changed, and counts.

    Attributes:
        skipped_steps: steps without an update because the loss or a gradient was not finite.
        scaler_skips: steps without an update because fp16's loss scale overflowed the gradients; part of its search
            for the largest scale, so they are counted apart and are not held against the run.
        streak: non-finite steps in a row up to now.
        rollbacks: times the run went back to a checkpoint because of such a streak.
    """

    def __init__(self, config: GuardConfig):
        self.config = config
        self.skipped_steps = 0
        self.scaler_skips = 0
        self.streak = 0
        self.rollbacks = 0

    def judge(self, loss: Tensor, grad_norm: Tensor, *, loss_scale: float | None = None) -> Verdict:
        """Reads whether a step may be applied, and counts it. This is the one wait for the device in a step.

        Args:
            loss: scalar, the step's loss.
            grad_norm: scalar, the global norm of the unscaled gradients, before clipping.
            loss_scale: fp16's current loss scale; None without one. A finite loss whose gradients overflow is the
                scale's doing as long as there is a scale above 1 to lower.
        """
        loss_is_finite, norm_is_finite = torch.stack([torch.isfinite(loss), torch.isfinite(grad_norm)]).tolist()
        if loss_is_finite and norm_is_finite:
            self.streak = 0
            return Verdict.GOOD
        if loss_is_finite and loss_scale is not None and loss_scale > 1.0:
            self.scaler_skips += 1
            return Verdict.SCALE_TOO_LARGE
        self.skipped_steps += 1
        self.streak += 1
        return Verdict.NOT_FINITE

    @property
    def must_roll_back(self) -> bool:
        """The streak is as long as the config allows."""
        return self.streak >= self.config.max_consecutive_bad_steps

    @property
    def may_roll_back(self) -> bool:
        """The run has a rollback left."""
        return self.rollbacks < self.config.max_rollbacks

    def state_dict(self) -> dict[str, int]:
        """The counters."""
        return {
            "skipped_steps": self.skipped_steps,
            "scaler_skips": self.scaler_skips,
            "streak": self.streak,
            "rollbacks": self.rollbacks,
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Puts the counters back."""
        self.skipped_steps = state["skipped_steps"]
        self.scaler_skips = state["scaler_skips"]
        self.streak = state["streak"]
        self.rollbacks = state["rollbacks"]


def non_finite_parameters(model: nn.Module) -> list[str]:
    """Names of the parameters that hold a NaN or an infinity."""
    named = list(model.named_parameters())
    # the largest number tells as much as all of them, and needs no tensor as large as the parameter
    largest = torch.stack([torch.linalg.vector_norm(p.detach(), torch.inf) for _, p in named])
    finite = torch.isfinite(largest).tolist()
    return [name for (name, _), is_finite in zip(named, finite, strict=True) if not is_finite]


def _tensors(output: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point())


@contextmanager
def _outputs_watched(model: nn.Module, found: list[str]) -> Iterator[None]:
    """Appends the name of every module whose output is not finite, in the order in which they finish."""

    def watch(name: str) -> Any:
        def hook(module: nn.Module, _inputs: Any, output: Any) -> None:
            if not all(bool(torch.isfinite(t).all()) for t in _tensors(output)):
                found.append(f"{name or 'the model'} ({type(module).__name__})")

        return hook

    handles = [module.register_forward_hook(watch(name)) for name, module in model.named_modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def first_non_finite(run: Run, batches: Sequence[Batch]) -> str:
    """Which module went wrong first when ``batches`` are computed once more, in words.

    A module is named when its output holds a NaN or an infinity, children before parents; a fault of the backward
    pass alone is named by the parameters whose gradients show it. Gradients are left empty.

    Args:
        run: only its model, its loss and its gradients are used.
        batches: the micro-batches of the step.
    """
    run.model.set_runtime(compile=False)  # compiled layers call no hooks
    broken = non_finite_parameters(run.model)
    if broken:
        return f"parameter {broken[0]} is not finite ({len(broken)} parameters are not)"
    found: list[str] = []
    run.optimizer.zero_grad(set_to_none=True)
    totals = Totals.of(batches)
    for batch in batches:
        with _outputs_watched(run.model, found):
            terms = run.loss(batch)
        if found:
            return f"the first module with a non-finite output is {found[0]}"
        run.backward(totals.share(terms))
    named = run.model.named_parameters()
    gradients = [name for name, p in named if not all(values.isfinite().all() for values in gradient_values([p]))]
    run.optimizer.zero_grad(set_to_none=True)
    if gradients:
        return f"all outputs are finite, the gradient of {gradients[-1]} is not"
    return "it did not happen again when the step was repeated"
