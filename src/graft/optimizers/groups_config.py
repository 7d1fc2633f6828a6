"""Fields every optimizer shares: peak rate, decay, and settings per parameter role."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

from graft.config.base import Config, Problem, knob
from graft.config.families import OptimizerConfig
from graft.config.roles import Role

RowUpdate = Literal["rowwise_adagrad", "rowwise_adam"]


def beta_problems(betas: tuple[float, float] | None) -> Iterator[Problem]:
    """Moment decays with which a moment would never forget, or would grow."""
    if betas is not None and not all(0.0 <= beta < 1.0 for beta in betas):
        yield Problem(("betas",), f"betas {betas} are not in [0, 1)", "set both below 1, for example [0.9, 0.95]")


class RoleOverride(Config):
    """Settings of the parameters of one role; null = the optimizer's own."""

    lr_multiplier: float | None = knob(None, "factor on the peak learning rate", ge=0.0)
    weight_decay: float | None = knob(None, "decoupled weight decay", ge=0.0)
    betas: tuple[float, float] | None = knob(None, "Adam's moment decays")
    eps: float | None = knob(None, "Adam's and Adagrad's epsilon", gt=0.0)
    update: RowUpdate | None = knob(
        None,
        "for tables read row by row (expert_table): touch only the rows a step used. rowwise_adagrad keeps one number "
        "per row, rowwise_adam two per weight; null = the optimizer's own update of every row",
    )

    def problems(self) -> Iterator[Problem]:
        yield from beta_problems(self.betas)
        if self.betas is not None and self.update == "rowwise_adagrad":
            yield Problem(("betas",), "betas do nothing here: rowwise_adagrad has none", "remove betas")


class GroupedOptimizerConfig(OptimizerConfig):
    """Base of the optimizers' configs. A multiplier scales the peak, so the schedule acts on every group alike."""

    learning_rate: float = knob(doc="peak learning rate", gt=0.0)
    weight_decay: float = knob(
        0.1, "decoupled weight decay of matrices and embeddings; norms, biases and scalars get none", ge=0.0
    )
    groups: Mapping[Role, RoleOverride] = knob(
        doc="settings per role, e.g. {embedding: {weight_decay: 0}}", factory=dict
    )
