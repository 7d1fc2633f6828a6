"""The mixture of experts."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from graft.channel_mixers.experts import Experts
from graft.channel_mixers.mlp_config import MlpConfig
from graft.channel_mixers.moe_config import MoeConfig
from graft.channel_mixers.router import Router, Routing
from graft.ops.router_losses import balance_sum, z_sum
from graft.ops.routing import count
from graft.part import Context, Part, PartOutput, Site, State, linear_flops
from graft.shapes import Float


class Moe(Part):
    """Sparse mixture of feed-forward networks: ``y = Σ_{e chosen} w_e · network_e(x) [+ gate · shared(x)]``.

    Sources: Outrageously Large Neural Networks (1701.06538); Mixtral (2401.04088), OLMoE (2409.02060) and Qwen3-MoE
    (2505.09388) for softmax scoring; DeepSeek-V3 (2412.19437) for sigmoid scoring, groups and shared experts; Qwen2-MoE
    (2407.10671) for the gate on the shared experts. Balance: the loss of Switch Transformer (2101.03961), the router's
    z-loss of ST-MoE (2202.08906), or a bias moved after each update (2408.15664).

    Deviations: no noise on the router, no capacity and nothing dropped. The balance loss is computed in each row over
    its own positions (the papers: over the batch) and weighted by their number, so that a step does not depend on how
    it is cut into micro-batches; its shares add up to num_experts_per_tok, as in transformers, and every layer has its
    own (transformers averages over layers first). With sigmoid scoring its probabilities are the scores divided by
    their sum, as in DeepSeek-V3's loss within a sequence. Padding is routed like everything else, but counts for no
    loss and no load.

    Acts on each position alone: no state.
    Cost: ``2·D·E + k · 2 · (3 or 2) · D · F`` forward FLOPs per position, and the shared experts'.
    """

    def __init__(self, config: MoeConfig, site: Site):
        super().__init__()
        self.config = config
        self.balance_coef, self.z_coef = config.router_aux_loss_coef, config.router_z_loss_coef
        self.share_chosen = config.num_experts_per_tok / config.num_experts
        self.router = Router(config, site)
        self.experts = Experts(config, site)
        self.shared_experts = _shared(config).build(site) if config.num_shared_experts else None
        self.shared_gate = site.make_linear(site.hidden_size, 1, role="router") if config.shared_expert_gate else None

    def forward(self, x_BTD: Float[Tensor, "B T D"], ctx: Context, state: State = None) -> PartOutput:
        routing = self.router(x_BTD)
        y_BTD = self.experts(x_BTD, routing.experts, routing.weights, self.kernels)
        if self.shared_experts is not None:
            shared_BTD = self.shared_experts(x_BTD, ctx).y
            y_BTD = y_BTD + (shared_BTD if self.shared_gate is None else self.shared_gate(x_BTD).sigmoid() * shared_BTD)
        real_BT = ctx.real()
        usage = {"experts": count(routing.experts, self.experts.num_experts, real_BT)} if self.training else {}
        return PartOutput(y_BTD, aux=self._losses(routing, real_BT), usage=usage)

    def _losses(self, routing: Routing, real_BT: Tensor) -> dict[str, Tensor]:
        """The router's losses, weighted by their coefficients."""
        sums: dict[str, Tensor] = {}
        if self.balance_coef:
            balance = balance_sum(routing.probabilities_BTE, routing.experts, real_BT)
            sums["router_balance"] = self.balance_coef * balance
        if self.z_coef:
            sums["router_z"] = self.z_coef * z_sum(routing.logits_BTE, real_BT)
        return sums

    def after_update(self, usage: Mapping[str, Tensor]) -> None:
        if "experts" in usage:  # counted while training only
            self.router.balance(usage["experts"])

    def flops_per_token(self, seq_len: int) -> float:
        chosen = sum(linear.num_weights for linear in self.experts.linears()) * self.share_chosen
        return float(linear_flops(self) + 2 * self.router.weight.numel() + 2 * chosen)

    def active_parameters(self) -> int:
        owned = sum(p.numel() for linear in self.experts.linears() for p in linear.parameters(recurse=False))
        return super().active_parameters() - owned + round(owned * self.share_chosen)


def _shared(config: MoeConfig) -> MlpConfig:
    """Shared experts side by side are one network: their outputs are added up."""
    return MlpConfig(
        intermediate_size=config.num_shared_experts * config.intermediate_size,
        activation=config.activation,
        gated=config.gated,
        bias=config.bias,
    )
