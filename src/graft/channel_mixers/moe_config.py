"""Config of the mixture of experts."""

from collections.abc import Iterator
from typing import Literal

from graft.config.base import Problem, knob
from graft.config.families import ChannelMixerConfig


class MoeConfig(ChannelMixerConfig):
    """Each position goes through its best few of many feed-forward networks (1701.06538); no capacity, no drops."""

    implementation = "graft.channel_mixers.moe:Moe"
    type: Literal["moe"] = knob("moe", "tag")
    num_experts: int = knob(doc="feed-forward networks to choose from (E)", ge=2)
    num_experts_per_tok: int = knob(2, "experts each position goes through (Mixtral's choice)", ge=1)
    intermediate_size: int = knob(doc="inner width of one expert (F)", ge=1)
    activation: Literal["silu", "gelu", "gelu_tanh", "relu", "relu2"] = knob(
        "silu", "nonlinearity; relu2 = relu² (2109.08668)"
    )
    gated: bool = knob(True, "three matrices per expert with a gate, or two without")
    bias: bool = knob(False, "biases on all matrices of the experts")
    scoring: Literal["softmax", "sigmoid"] = knob(
        "softmax", "how router logits become scores: softmax over the experts, or each expert's sigmoid (DeepSeek-V3)"
    )
    norm_topk_prob: bool = knob(True, "divide the scores of the chosen experts by their sum (Mixtral, Qwen3-MoE)")
    routed_scaling_factor: float = knob(1.0, "factor on the chosen experts' weights (DeepSeek-V3: 2.5)", gt=0.0)
    num_groups: int = knob(1, "groups of experts of which a position uses only some (DeepSeek-V3: 8); 1 = none", ge=1)
    num_groups_per_tok: int | None = knob(
        None, "groups a position may choose experts from (DeepSeek-V3: 4); null = all", ge=1
    )
    num_shared_experts: int = knob(
        0, "experts every position goes through beside the chosen ones, as one network of so many times the width", ge=0
    )
    shared_expert_gate: bool = knob(False, "weigh the shared experts by a sigmoid of the input (Qwen2-MoE)")
    router_aux_loss_coef: float = knob(
        0.01, "weight of the balance loss (Switch Transformer's choice, 2101.03961); 0 = none", ge=0.0
    )
    router_z_loss_coef: float = knob(
        0.0,
        "weight of logsumexp(router logits)² (ST-MoE, 2202.08906: 1e-3); 0 = none",
        ge=0.0,
        only_if={"scoring": "softmax"},
    )
    balance_bias_rate: float | None = knob(
        None,
        "step by which a bias on each expert's score follows its load after every update (2408.15664: 1e-3); it decides"
        " who is chosen, never the weights; 0 = frozen; null = no bias",
        ge=0.0,
    )

    def counts_choices(self) -> bool:
        return True

    def problems(self) -> Iterator[Problem]:
        if self.num_experts_per_tok > self.num_experts:
            yield Problem(
                ("num_experts_per_tok",),
                f"{self.num_experts_per_tok} of {self.num_experts} experts cannot be chosen",
                "lower it, or raise num_experts",
            )
        if self.num_experts_per_tok == 1 and self.norm_topk_prob:
            yield Problem(
                ("norm_topk_prob",),
                "a single expert's weight divided by itself is always 1, so the router learns nothing from the loss",
                "set norm_topk_prob: false, or num_experts_per_tok: 2",
            )
        if self.shared_expert_gate and not self.num_shared_experts:
            yield Problem(
                ("shared_expert_gate",), "there is no shared expert to weigh", "set num_shared_experts, or remove it"
            )
        yield from self._group_problems()

    def _group_problems(self) -> Iterator[Problem]:
        if self.num_experts % self.num_groups:
            yield Problem(
                ("num_groups",),
                f"{self.num_experts} experts do not form {self.num_groups} groups of equal size",
                "choose a divisor of num_experts",
            )
            return
        kept = self.num_groups_per_tok or self.num_groups
        grouped = self.num_groups > 1 or self.num_groups_per_tok is not None
        if grouped and kept >= self.num_groups:
            yield Problem(
                ("num_groups_per_tok",),
                f"a position may use {kept} of {self.num_groups} groups, so they limit nothing",
                "set num_groups_per_tok lower than num_groups, or remove both",
            )
        elif kept * (self.num_experts // self.num_groups) < self.num_experts_per_tok:
            yield Problem(
                ("num_groups_per_tok",),
                f"{kept} groups of {self.num_experts // self.num_groups} experts have fewer than the "
                f"{self.num_experts_per_tok} each position chooses",
                "raise it, or lower num_experts_per_tok",
            )

    def advice_in(self, hidden_size: int) -> Iterator[Problem]:
        if not self.router_aux_loss_coef and not self.balance_bias_rate:
            yield Problem(
                ("router_aux_loss_coef",),
                "nothing spreads positions over the experts, so most of them may never be chosen",
                "set router_aux_loss_coef or balance_bias_rate",
            )
        if self.num_experts_per_tok == self.num_experts:
            yield Problem(
                ("num_experts_per_tok",),
                f"every position goes through all {self.num_experts} experts, so nothing is saved",
                "lower it",
            )
