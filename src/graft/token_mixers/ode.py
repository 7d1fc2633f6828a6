"""A token mixer, or a whole layer, as a differential equation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from graft.config.families import NormConfig, PartConfig
from graft.config.roles import Role
from graft.initialization import Rng
from graft.ops.runge_kutta import TABLEAUS, increment
from graft.part import Context, Part, PartOutput, Site, State, add_sums
from graft.shapes import Float
from graft.token_mixers.ode_config import OdeConfig

Evaluations = list[list[State]]
"""The state of each part inside, for each evaluation of f."""


class NormedPart(nn.Module):
    """A part inside f behind its norm: ``part(norm(z))``.

    Args:
        config: the part.
        norm: the kind of norm; None = the model's.
        site: the surroundings.
    """

    def __init__(self, config: PartConfig, norm: NormConfig | None, site: Site):
        super().__init__()
        self.norm = None if config.norms_inside else site.make_norm(site.hidden_size, norm)
        self.part: Part = config.build(site)

    def forward(self, z_BTD: Tensor, ctx: Context, state: State = None) -> PartOutput:
        return self.part(z_BTD if self.norm is None else self.norm(z_BTD), ctx, state)


class Ode(Part):
    """The stream carried along by ``z' = f(z, t)`` from t = 0 to 1 (Neural ODE, arXiv 1806.07366; ODE Transformer,
    2203.09176), solved by an explicit Runge-Kutta method.

    ``y = z(1) − z(0)`` with ``z(0) = x``, the stream as it is: one step of Euler is the branch of a pre-norm block.
    ``f(z) = mixer(norm(z))``; of ``branches``, what a pre-norm block of them adds to z. The norm is inside f whatever
    the branch's placement (`PartConfig.norms_inside`), which decides about norms after the part alone.

    Deviations: gradients go through the solver's steps (no adjoint equation), steps are fixed; the papers' learned
    coefficients are the solver's weights b, one per stage, not forced to add up to 1; time enters as
    ``f(z + (1 − t)·u + t·v)``; ``aux`` adds up over evaluations, and what f publishes is that of its first evaluation.
    Hidden matrices of the parts inside have the role "ode".

    State: that of the parts inside for *each* evaluation, since each sees other keys: their bytes · steps · stages.
    FLOPs: theirs · steps · stages. With activation checkpointing each evaluation is recomputed by itself in the
    backward pass, so that only one's activations are alive at a time (a compiled layer keeps what the compiler says).

    Args:
        config: what is computed.
        site: the surroundings.
    """

    param_roles: Mapping[str, Role] = {"weights": "scalar", "time_start": "bias", "time_end": "bias"}

    def __init__(self, config: OdeConfig, site: Site):
        super().__init__()
        self.config = config
        self.tableau, self.steps = TABLEAUS[config.solver], config.steps
        self.num_evaluations = config.num_evaluations
        inside = replace(site, matrix_role="ode")
        self.field = nn.ModuleList(NormedPart(part, config.norm, inside) for part in config.parts)
        self.weights = nn.Parameter(torch.empty(len(self.tableau.weights))) if config.learnable_coefficients else None
        self.time_start = nn.Parameter(torch.empty(site.hidden_size)) if config.time_conditioning else None
        self.time_end = nn.Parameter(torch.empty(site.hidden_size)) if config.time_conditioning else None

    def init_parameters(self, rng: Rng) -> None:
        """The solver's own weights, and no influence of time."""
        with torch.no_grad():
            if self.weights is not None:
                self.weights.copy_(torch.tensor(self.tableau.weights, dtype=torch.float64))
            for vector in (self.time_start, self.time_end):
                if vector is not None:
                    nn.init.zeros_(vector)

    def forward(self, x_BTD: Float[Tensor, "B T D"], ctx: Context, state: Evaluations | None = None) -> PartOutput:
        """[B, T, D], the stream itself, to [B, T, D]; see `graft.part.Part`."""
        aux: dict[str, Tensor] = {}
        usage: dict[str, Tensor] = {}
        first: dict[str, Tensor] = {}
        after: Evaluations = []
        recompute = self.checkpointing == "block" and state is None and self.num_evaluations > 1

        def field(z_BTD: Tensor, t: float, evaluation: int) -> Tensor:
            nonlocal aux, usage
            now = None if state is None else state[evaluation]
            if recompute and torch.is_grad_enabled() and not torch.compiler.is_compiling():
                out, states = checkpoint(self.evaluate, z_BTD, t, ctx, now, use_reentrant=False)
            else:
                out, states = self.evaluate(z_BTD, t, ctx, now)
            aux, usage = add_sums(aux, out.aux), add_sums(usage, out.usage)
            if evaluation == 0:
                first.update(out.published)
            after.append(states)
            return out.y

        y_BTD = increment(field, x_BTD, self.tableau, self.steps, self.weights)
        return PartOutput(y_BTD, None if state is None else after, aux, first, usage)

    def evaluate(
        self, z_BTD: Tensor, t: float, ctx: Context, states: list[State] | None
    ) -> tuple[PartOutput, list[State]]:
        """f at one point in time: what the parts add to z, and their states after it."""
        if self.time_start is not None and self.time_end is not None:
            z_BTD = z_BTD + ((1 - t) * self.time_start + t * self.time_end).to(z_BTD.dtype)
        sums: list[Tensor] = []
        aux: dict[str, Tensor] = {}
        published: dict[str, Tensor] = {}
        usage: dict[str, Tensor] = {}
        after: list[State] = []
        for i, part in enumerate(self.field):
            out: PartOutput = part(z_BTD, ctx, None if states is None else states[i])
            sums.append(out.y)
            z_BTD = z_BTD + out.y
            aux = add_sums(aux, out.aux)
            usage |= {f"{i}.{counted}": counts for counted, counts in out.usage.items()}
            published.update(out.published)
            ctx = replace(ctx, published={**ctx.published, **out.published})
            after.append(out.state)
        return PartOutput(sum(sums[1:], start=sums[0]), None, aux, published, usage), after

    def after_update(self, usage: Mapping[str, Tensor]) -> None:
        """Hands each part inside its own counts."""
        for i, part in enumerate(self.parts()):
            prefix = f"{i}."
            part.after_update({k.removeprefix(prefix): n for k, n in usage.items() if k.startswith(prefix)})

    def parts(self) -> list[Part]:
        """The parts inside, in order."""
        return [m.part for m in self.field if isinstance(m, NormedPart)]

    def init_state(self, batch_size: int, max_len: int, *, device: torch.device, dtype: torch.dtype) -> Evaluations:
        """A state of each part for each evaluation."""
        return [
            [part.init_state(batch_size, max_len, device=device, dtype=dtype) for part in self.parts()]
            for _ in range(self.num_evaluations)
        ]

    def flops_per_token(self, seq_len: int) -> float:
        return self.num_evaluations * sum(part.flops_per_token(seq_len) for part in self.parts())

    def active_parameters(self) -> int:
        """All but those that the parts inside leave out."""
        everything = sum(p.numel() for p in self.parameters())
        return everything - sum(
            sum(p.numel() for p in part.parameters()) - part.active_parameters() for part in self.parts()
        )
