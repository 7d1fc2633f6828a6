"""The one mutable object of a training run, and everything that has to be kept to continue it bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from graft.config.advice import marks
from graft.config.experiment import Experiment
from graft.data.batch import Batch
from graft.faults import fault_active, fault_point
from graft.objectives.base import LossTerms, Objective
from graft.ops.row_gradients import LookUpsApart
from graft.optimizers.groups import set_learning_rate
from graft.training.gradients import global_norm, gradient_values, scale_to_norm, tied_table
from graft.training.guard import Guard, Verdict
from graft.training.precision import Precision
from graft.training.rng import rng_state, set_rng_state
from graft.training.totals import Totals
from graft.training.usage import UsageMemory, summed_over_ranks

if TYPE_CHECKING:
    from graft.data.loader import TrainLoader
    from graft.data.prepare import PreparedData
    from graft.model import Model
    from graft.schedules.base import Schedule


class Run:
    """A model in training.

    Args:
        experiment: what is computed.
        model: the network, on its device.
        prepared: tokenizer and token stores.
        device: where the model is.
        precision: autocast and loss scale.
        directory: where the run is kept; None = nowhere.

    Attributes:
        look_ups: what look-ups add to the gradient of an embedding table that is the head's matrix too, on a CPU; None
            where autograd adds it.
        parameters: the model's, listed once: walking the modules twice a step takes longer than a small layer.
        step: updates made or skipped so far; the next one is number ``step + 1`` and uses ``schedule.factor(step)``.
        tokens: training positions seen.
        window: sums since the last metric line.
        usage: what the model chose, counted.
        guard: what went wrong so far.
        best_loss: lowest held-out loss so far, in nats per target; None before the first evaluation.
        last_evaluation: step and numbers of the newest evaluation, with the run's `marks`.
        loader: where the next micro-batches come from, with its exact position.
    """

    def __init__(
        self,
        experiment: Experiment,
        model: Model,
        prepared: PreparedData,
        loader: TrainLoader,
        *,
        device: torch.device,
        precision: Precision,
        directory: Path | None = None,
    ):
        self.experiment = experiment
        self.model = model
        self.parameters = list(model.parameters())
        self.prepared = prepared
        self.loader = loader
        self.device = device
        self.precision = precision
        self.directory = directory
        self.objective: Objective = experiment.objective.build()
        self.optimizer: torch.optim.Optimizer = experiment.optimizer.build(model)
        table = tied_table(model)
        self.look_ups = None if table is None or device.type != "cpu" else LookUpsApart(table)
        self.schedule: Schedule = experiment.schedule.build(
            max_steps=experiment.max_steps, tokens_per_step=experiment.tokens_per_step
        )
        self.guard = Guard(experiment.training.guard)
        self.step = 0
        self.tokens = 0
        self.window = Totals()
        self.usage = UsageMemory()
        self.best_loss: float | None = None
        self.last_evaluation: tuple[int, dict[str, float | None]] | None = None

    @property
    def max_steps(self) -> int:
        """The step the run ends at."""
        return self.experiment.max_steps

    @property
    def marks(self) -> dict[str, bool]:
        """What is true of every number of the run (`graft.config.advice.marks`)."""
        return marks(self.experiment.model)

    def next_microbatches(self) -> list[Batch]:
        """The next step's micro-batches, on the device."""
        fault_point("train.step", self.step + 1)
        return [batch.to(self.device) for batch in self.loader.next_step()]

    def loss(self, batch: Batch) -> LossTerms:
        """The objective's *sums* over one micro-batch, computed in the run's precision."""
        look_ups = self.look_ups if torch.is_grad_enabled() else None
        with self.precision.autocast(), nullcontext() if look_ups is None else look_ups.during():
            return self.objective.loss(self.model, batch)

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of a micro-batch's share of the loss, times the loss scale, to the parameters'."""
        self.precision.scale(loss).backward()
        if self.look_ups is not None:
            self.look_ups.add_up()

    def gradient_norm(self) -> Tensor:
        """Undoes the loss scale, then returns the gradients' global norm (a scalar on the device). Clips nothing."""
        self.precision.unscale(self.optimizer)
        gradients = gradient_values(self.parameters)
        injected = fault_active("train.gradient", self.step + 1)
        if injected is not None:
            gradients[0].view(-1)[0] = float(injected)
        return global_norm(gradients)

    def judge(self, loss: Tensor, grad_norm: Tensor) -> Verdict:
        """Whether the step may be applied; nothing has been changed so far. Counted in `guard`."""
        return self.guard.judge(loss, grad_norm, loss_scale=self.precision.loss_scale)

    def update(self, verdict: Verdict, grad_norm: Tensor) -> float:
        """Applies the step if it is good, and forgets its gradients either way.

        A skipped step leaves every parameter and all optimizer state bit for bit as they were; only fp16's loss scale
        reacts. Gradients are scaled down to ``training.max_grad_norm`` if their norm exceeds it.

        Returns the learning rate the step used (or would have).
        """
        learning_rate = set_learning_rate(self.optimizer, self.schedule.factor(self.step))
        if verdict is Verdict.GOOD:
            self._clip(grad_norm)
            self.precision.step(self.optimizer)
        self.precision.update(overflowed=verdict is not Verdict.GOOD)
        self.optimizer.zero_grad(set_to_none=True)
        return learning_rate

    def _clip(self, grad_norm: Tensor) -> None:
        """Scales the gradients down to ``training.max_grad_norm``; leaves them alone when their norm is below it."""
        largest = self.experiment.training.max_grad_norm
        if largest is not None and float(grad_norm) > largest - 1e-5:  # PyTorch divides by norm + 1e-6
            scale_to_norm(gradient_values(self.parameters), largest, grad_norm)

    def finish_step(self, verdict: Verdict, totals: Totals) -> None:
        """Moves on to the next step. A skipped step's data counts as seen, its sums enter no mean."""
        self.step += 1
        self.tokens += totals.num_positions
        if verdict is Verdict.GOOD:
            totals.usage = summed_over_ranks(totals.usage)
            self.model.after_update(totals.usage)
            self.usage.add(self.step, totals.usage)
            self.window.merge(totals)

    def note_evaluation(self, numbers: Mapping[str, float | None]) -> None:
        """Remembers an evaluation made at this step, and whether it was the best."""
        self.last_evaluation = (self.step, {**numbers, **self.marks})
        loss = numbers["loss"]
        if loss is not None and (self.best_loss is None or loss < self.best_loss):
            self.best_loss = loss

    @property
    def score(self) -> float | None:
        """The held-out loss of the weights as they are now; None when they have not been evaluated."""
        step, numbers = self.last_evaluation or (None, {})
        return numbers.get("loss") if step == self.step else None

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """Everything the rest of the run depends on, by the file it is kept in.

        Parameters are named, so that optimizer state finds its parameter whatever the grouping.
        """
        return {
            "model": self.model.state_dict(),
            "optimizer": {"state": named_optimizer_state(self.model, self.optimizer)},
            "precision": self.precision.state_dict(),
            "data": self.loader.state_dict(),
            "rng": rng_state(),
            "progress": {
                "step": self.step,
                "tokens": self.tokens,
                "window": self.window.state_dict(),
                "usage": self.usage.state_dict(),
                "guard": self.guard.state_dict(),
                "best_loss": self.best_loss,
                "last_evaluation": self.last_evaluation,
            },
        }

    def load_state_dict(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Puts back what `state_dict` returned; the model's tensors must fit (see `graft.training.resume`).

        Settings of the optimizer (rates, decay, betas) are not part of it: they are the config's.
        """
        self.model.load_state_dict(dict(state["model"]))
        load_named_optimizer_state(self.model, self.optimizer, state["optimizer"]["state"])
        self.precision.load_state_dict(dict(state["precision"]))
        self.loader.load_state_dict(dict(state["data"]))
        set_rng_state(dict(state["rng"]))
        progress = state["progress"]
        self.step, self.tokens = progress["step"], progress["tokens"]
        self.window = Totals.from_state(progress["window"], self.device)
        self.usage.load_state_dict(progress["usage"], self.device)
        self.guard.load_state_dict(progress["guard"])
        self.best_loss = progress["best_loss"]
        self.last_evaluation = progress["last_evaluation"]


def _names_in_order(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """Parameter names in the order in which an optimizer numbers them."""
    names = {id(p): name for name, p in model.named_parameters()}
    return [names[id(p)] for group in optimizer.param_groups for p in group["params"]]


def named_optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Any]]:
    """Parameter name -> what the optimizer keeps for it (moments, step counts)."""
    packed = optimizer.state_dict()["state"]
    return {name: packed[i] for i, name in enumerate(_names_in_order(model, optimizer)) if i in packed}


def load_named_optimizer_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, Mapping[str, Any]]
) -> None:
    """Puts back what `named_optimizer_state` returned; groups and their settings stay as they are."""
    packed = {i: dict(state[name]) for i, name in enumerate(_names_in_order(model, optimizer)) if name in state}
    optimizer.load_state_dict({"state": packed, "param_groups": optimizer.state_dict()["param_groups"]})
