"""Very many tiny experts, retrieved by product keys."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graft.channel_mixers.peer_config import PeerConfig
from graft.channel_mixers.query_norm import QueryBatchNorm
from graft.config.roles import Role
from graft.initialization import Rng, normal_
from graft.norms.layer_norm_config import LayerNormConfig
from graft.norms.rms_norm_config import RMSNormConfig
from graft.ops.activations import ACTIVATIONS
from graft.ops.autocast import full_precision
from graft.ops.expert_rows import expert_rows
from graft.ops.product_keys import product_topk
from graft.ops.routing import count
from graft.part import Context, Part, PartOutput, Site, State, linear_flops
from graft.shapes import Float

NORMS = {"layer": LayerNormConfig(), "rms": RMSNormConfig()}


class Peer(Part):
    """Parameter-efficient expert retrieval (Mixture of a Million Experts, arXiv 2407.04153, sections 2.1 and 2.2).

    Each head makes a query of x, finds the k experts with the best scores ``Σ_a q_a · key_a[i_a]`` exactly
    (`graft.ops.product_keys`), and weights them by the softmax over those k:
    ``y = Σ_heads Σ_i g_i · Σ_j act(down[i, j] · x) · up[i, j]``, i = ``Σ_a i_a · Π_{b > a} D_b``. Heads have queries of
    their own and share keys and experts. Routing is computed in fp32 at least.

    Queries, their norm and keys have the role "router" (the norm "norm"): they only choose, so they stay dense and in
    full precision whatever linear maps the model has, Muon leaves them to AdamW (equal singular values would say how
    sharp the choice is), and both sides of a score decay alike. The two tables, [E, h·D] each, have the role
    "expert_table": no decay, a rate of their own through ``optimizer.groups.expert_table``, and row-wise updates there.

    Deviations: one to four axes instead of two; experts with h hidden units; ``query_norm`` may be any; cosines times
    a learned temperature on request; padding contributes nothing and is counted nowhere. With ``query_norm: batch`` a
    micro-batch of four rows does not equal four of one, and training sees through the statistics what it should not
    (`graft.channel_mixers.query_norm`); evaluation and decoding do not. Keys start with standard deviation
    C^-½ (C channels per axis), so that scores of normed queries start with variance near the number of axes; the
    tables start as the model's other matrices.

    State: none. Cost: 2·D·N·Q + 2·N·C·ΣD_a + 4·N·k·h·D forward FLOPs per position (queries, scores, experts; Q channels
    of a query).

    Args:
        config: what is computed.
        site: the surroundings.
    """

    row_tables = ("expert_down", "expert_up")

    def __init__(self, config: PeerConfig, site: Site):
        super().__init__()
        self.config = self._config = config
        self.axes, self.axis_dim = len(config.product_key_dims), config.query_dim // len(config.product_key_dims)
        self.hidden_size, width = site.hidden_size, config.expert_hidden_size * site.hidden_size
        self.query_proj = site.make_linear(site.hidden_size, config.num_heads * config.query_dim, role="router")
        self.query_norm = self._make_norm(site)
        for axis, dim in enumerate(config.product_key_dims):
            self.register_parameter(f"keys_{axis}", nn.Parameter(torch.empty(dim, self.axis_dim)))
        self.temperature = nn.Parameter(torch.empty(config.num_heads)) if config.qk_cosine else None
        self.expert_down = nn.Parameter(torch.empty(config.grid_size, width))
        self.expert_up = nn.Parameter(torch.empty(config.grid_size, width))
        depth = site.num_branches if site.init.residual == "depth" else 1
        self.down_std, self.up_std = site.init.std, site.init.std / depth**0.5
        self.param_roles = self._roles()
        self.activation = ACTIVATIONS[config.activation]

    def _make_norm(self, site: Site) -> nn.Module | None:
        kind = self._config.query_norm
        if kind == "batch":
            return QueryBatchNorm(self._config.num_heads * self._config.query_dim)
        return None if kind == "none" else site.make_norm(self._config.query_dim, NORMS[kind])

    def _roles(self) -> dict[str, Role]:
        roles: dict[str, Role] = {f"keys_{axis}": "router" for axis in range(self.axes)}
        return {**roles, "temperature": "scalar", "expert_down": "expert_table", "expert_up": "expert_table"}

    def init_parameters(self, rng: Rng) -> None:
        for axis, key_DC in enumerate(self.keys()):
            normal_(key_DC, self.axis_dim**-0.5, rng(f"keys_{axis}"))
        if self.temperature is not None:
            nn.init.constant_(self.temperature, self._config.query_dim**0.5)
        normal_(self.expert_down, self.down_std, rng("expert_down"))
        normal_(self.expert_up, self.up_std, rng("expert_up"))

    def keys(self) -> list[Tensor]:
        """[D_a, C] of each axis."""
        return [self.get_parameter(f"keys_{axis}") for axis in range(self.axes)]

    def forward(self, x_BTD: Float[Tensor, "B T D"], ctx: Context, state: State = None) -> PartOutput:
        x_RD = x_BTD.flatten(0, 1)
        real_R = None if ctx.segment_ids_BT is None else (ctx.segment_ids_BT != 0).flatten()
        usage: dict[str, Tensor] = {}
        with full_precision(x_RD.device):
            queries, keys = self._queries(x_RD, real_R, usage)
        scores, ids = product_topk(queries, keys, self._config.num_experts_per_tok, kernels=self.kernels)
        gates = F.dropout(scores.softmax(-1), self._config.dropout, self.training)
        ids_RK, gates_RK = (chosen.unflatten(0, (-1, self._config.num_heads)).flatten(1) for chosen in (ids, gates))
        if self.training and self._config.track_usage:
            usage["experts"] = count(ids_RK, self._config.grid_size, real_R)
        if real_R is not None:
            ids_RK, gates_RK = _without_padding(ids_RK, gates_RK, real_R)
        dtype = self.expert_down.dtype
        y_RD = expert_rows(
            x_RD.to(dtype),
            self.expert_down,
            self.expert_up,
            ids_RK,
            gates_RK.to(dtype),
            self.activation,
            kernels=self.kernels,
        )
        return PartOutput(y_RD.to(x_BTD.dtype).view_as(x_BTD), usage=usage)

    def _queries(self, x_RD: Tensor, real_R: Tensor | None, usage: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
        """[R·N, A, C] queries and [D_a, C] keys, in fp32 at least; adds moments to ``usage`` (batch norm, training)."""
        keys = self.keys()
        wide = torch.promote_types(x_RD.dtype, torch.float32)
        q_RQ = self.query_proj(x_RD.to(torch.promote_types(x_RD.dtype, keys[0].dtype))).to(wide)
        if isinstance(self.query_norm, QueryBatchNorm):
            if self.training:
                usage["query_moments"] = self.query_norm.moments(q_RQ, real_R)
            q_RQ = self.query_norm(q_RQ, real_R)
        queries = q_RQ.view(-1, self._config.num_heads, self._config.query_dim)
        if self.query_norm is not None and not isinstance(self.query_norm, QueryBatchNorm):
            queries = self.query_norm(queries)
        queries, keys = queries.unflatten(-1, (self.axes, self.axis_dim)), [key_DC.to(wide) for key_DC in keys]
        if self.temperature is not None:
            queries = F.normalize(queries, dim=-1) * self.temperature.to(wide)[:, None, None]
            keys = [F.normalize(key_DC, dim=-1) for key_DC in keys]
        return queries.flatten(0, 1), keys

    def after_update(self, usage: Mapping[str, Tensor]) -> None:
        if isinstance(self.query_norm, QueryBatchNorm) and "query_moments" in usage:
            self.query_norm.remember(usage["query_moments"])

    def flops_per_token(self, seq_len: int) -> float:
        config = self._config
        scores = 2 * config.num_heads * self.axis_dim * sum(config.product_key_dims)
        read = config.num_heads * config.num_experts_per_tok * config.expert_hidden_size
        return float(linear_flops(self) + scores + 4 * read * self.hidden_size)

    def active_parameters(self) -> int:
        """All but the experts that no head picks."""
        tables = self.expert_down.numel() + self.expert_up.numel()
        read = min(self._config.num_heads * self._config.num_experts_per_tok, self._config.grid_size)
        return sum(p.numel() for p in self.parameters()) - tables + tables // self._config.grid_size * read


def _without_padding(ids_RK: Tensor, gates_RK: Tensor, real_R: Tensor) -> tuple[Tensor, Tensor]:
    """Padding gets no weight, and the experts of the first real position: so it touches no row of its own.

    (A micro-batch of nothing but padding touches those of its first position.)
    """
    first_1 = real_R.to(torch.int64).argmax(0, keepdim=True)
    return torch.where(real_R[:, None], ids_RK, ids_RK[first_1]), gates_RK * real_R[:, None].to(gates_RK.dtype)
