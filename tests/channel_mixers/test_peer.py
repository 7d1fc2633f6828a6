"""Experts retrieved by product keys: an independent form of the paper, cost, roles, batch norm, usage."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from graft.channel_mixers.peer import Peer
from graft.channel_mixers.peer_config import PeerConfig
from graft.config.model import InitConfig
from graft.cost.live_bytes import LiveBytes
from graft.initialization import initialize
from graft.linears.dense_config import DenseConfig
from graft.norms.rms_norm_config import RMSNormConfig
from graft.ops.product_keys import product_topk
from graft.ops.row_gradients import coalesce_rows, mark_rows, split_rows
from graft.optimizers.adamw_config import AdamWConfig
from graft.optimizers.groups import named_trainable
from graft.optimizers.groups_config import RoleOverride
from graft.optimizers.muon import takes_muon
from graft.part import Context, Site, parameter_roles

B, T, D = 2, 5, 12
GRIDS: dict[str, dict[str, Any]] = {
    "one axis": {"product_key_dims": [30], "query_dim": 6},
    "the paper": {"product_key_dims": [8, 8], "query_dim": 8, "query_norm": "batch"},
    "wide experts": {"product_key_dims": [8, 8], "query_dim": 8, "expert_hidden_size": 3, "query_norm": "rms"},
    "cosine, three axes": {"product_key_dims": [3, 5, 4], "query_dim": 9, "qk_cosine": True, "query_norm": "none"},
    "four axes": {"product_key_dims": [2, 3, 2, 4], "query_dim": 8, "activation": "relu"},
}
EVERY = pytest.mark.parametrize("fields", GRIDS.values(), ids=GRIDS.keys())


def config(**fields: Any) -> PeerConfig:
    return PeerConfig.model_validate({"num_experts_per_tok": 4, "num_heads": 3, **fields})


def peer(init: InitConfig | None = None, **fields: Any) -> Peer:
    site = Site(D, 0, 4, 8, True, RMSNormConfig(), DenseConfig(), init or InitConfig(std=0.5))
    part = config(**fields).build(site)
    initialize(part, 0)
    return part


def context(segments: Tensor | None = None, batch: int = B, length: int = T) -> Context:
    positions = torch.arange(length).expand(batch, length)
    return Context(torch.zeros(batch, length, dtype=torch.int64), positions, segments)


def oracle(fields: dict[str, Any], w: dict[str, Tensor], x: Tensor) -> Tensor:
    """The paper, position by position and head by head, every expert of the grid scored; evaluation mode."""
    dims, heads, k = fields["product_key_dims"], 3, 4
    hidden, size = fields.get("expert_hidden_size", 1), fields["query_dim"]
    act = {"gelu": F.gelu, "relu": torch.relu}[fields.get("activation", "gelu")]
    norm = fields.get("query_norm", "layer")
    outputs = []
    for vector in x.reshape(-1, D):
        everything = torch.mv(w["query_proj.weight"], vector)
        if norm == "batch":
            spread = (w["query_norm.running_var"] + 1e-5).sqrt()
            everything = (everything - w["query_norm.running_mean"]) / spread
            everything = everything * w["query_norm.weight"] + w["query_norm.bias"]
        total = torch.zeros(D, dtype=x.dtype)
        for head in range(heads):
            q = everything[head * size : (head + 1) * size]
            if norm == "layer":
                q = F.layer_norm(q, (size,), w["query_norm.weight"], w["query_norm.bias"], 1e-5)
            if norm == "rms":
                q = q / (q.square().mean() + 1e-6).sqrt() * w["query_norm.weight"]
            scores = torch.zeros(1, dtype=x.dtype)
            for axis, part in enumerate(q.chunk(len(dims))):
                keys = w[f"keys_{axis}"]
                along = torch.stack([torch.dot(part, key) for key in keys])
                if fields.get("qk_cosine"):
                    along = w["temperature"][head] * along / (part.norm() * keys.norm(dim=1))
                scores = (scores[:, None] + along[None, :]).reshape(-1)  # the last axis runs fastest
            chosen = scores.argsort(descending=True)[:k]
            for gate, expert in zip(torch.softmax(scores[chosen], 0), chosen, strict=True):
                down, up = (w[f"expert_{name}"][expert].view(hidden, D) for name in ("down", "up"))
                total = total + gate * sum(act(torch.dot(down[j], vector)) * up[j] for j in range(hidden))
        outputs.append(total)
    return torch.stack(outputs).view_as(x)


def loud(part: Peer) -> None:
    """Moves what starts at ones and zeros, so that it shows."""
    generator = torch.Generator().manual_seed(1)
    for tensor in (*part.parameters(), *part.buffers()):
        noise = torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
        tensor.data.add_(0.3 * noise.to(tensor.dtype))


@EVERY
@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_equals_the_paper_written_out(fields: dict[str, Any], kernels: Any) -> None:
    part = peer(**fields).double().eval()
    part.kernels = kernels
    loud(part)
    weights = {name: t.detach().clone() for name, t in part.state_dict().items()}
    learned = {name for name, _ in part.named_parameters()}
    for name in learned:
        weights[name].requires_grad_()
    x = torch.randn(B, T, D, dtype=torch.float64, requires_grad=True)
    other = x.detach().clone().requires_grad_()
    factor = torch.randn(B, T, D, dtype=torch.float64)
    y, expected = part(x, context()).y, oracle(fields, weights, other)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-12)
    (y * factor).sum().backward()
    (expected * factor).sum().backward()
    torch.testing.assert_close(x.grad, other.grad, rtol=1e-9, atol=1e-11)
    for name, parameter in part.named_parameters():
        assert parameter.grad.abs().max() > 0, name
        torch.testing.assert_close(parameter.grad, weights[name].grad, rtol=1e-9, atol=1e-11, msg=name)


def test_random_input_covers_more_than_half_of_the_experts() -> None:
    part = peer(product_key_dims=[32, 32], query_dim=16, num_heads=4, num_experts_per_tok=8)
    counts = part(torch.randn(4, 64, D), context(batch=4, length=64)).usage["experts"]
    assert counts.shape == (1024,)
    assert (counts > 0).double().mean() > 0.5


def test_every_expert_can_be_chosen() -> None:
    """Queries made of an expert's keys choose that expert: no number is out of reach."""
    part = peer(product_key_dims=[3, 5, 4], query_dim=15, query_norm="none", num_heads=1, num_experts_per_tok=1)
    with torch.no_grad():
        for key in part.keys():  # noqa: SIM118 - a method of ours
            key.copy_(torch.eye(5)[: len(key)])
    part.query_proj.weight.data = torch.eye(15)
    places = torch.cartesian_prod(torch.arange(3), torch.arange(5), torch.arange(4))
    x = torch.cat([F.one_hot(places[:, axis], 5) for axis in range(3)], dim=1).float()
    seen = product_topk(*part._queries(x, None, {}), 1)[1]
    assert seen[:, 0].tolist() == list(range(60))


def test_usage_counts_choices_of_unpadded_positions_in_training_only() -> None:
    part = peer(product_key_dims=[4, 4], query_dim=8)
    x, segments = torch.randn(B, T, D), torch.tensor([[1, 1, 2, 0, 0], [0, 7, 7, 7, 7]])
    counts = part(x, context(segments)).usage["experts"]
    assert (counts.dtype, int(counts.sum())) == (torch.int64, 7 * 3 * 4)
    alone = sum(
        part(x[b : b + 1, t : t + 1], context(batch=1, length=1)).usage["experts"] for b, t in segments.nonzero()
    )
    assert torch.equal(counts, alone)
    assert not part.eval()(x, context(segments)).usage
    assert not peer(product_key_dims=[4, 4], query_dim=8, track_usage=False)(x, context()).usage


@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_padding_says_nothing_and_touches_no_row(kernels: Any) -> None:
    part = peer(product_key_dims=[16, 16], query_dim=8)
    part.kernels = kernels
    for table in (part.expert_down, part.expert_up):
        mark_rows(table, True)
    x, segments = torch.randn(B, T, D), torch.tensor([[0, 1, 2, 0, 0], [0, 7, 7, 7, 7]])
    out = part(x, context(segments))
    assert not out.y[segments == 0].any()
    out.y.sum().backward()
    used = out.usage["experts"].nonzero()[:, 0]
    assert len(used) < 256
    for table in (part.expert_down, part.expert_up):
        assert torch.equal(split_rows(coalesce_rows(table.grad))[0], used)


def test_batch_norm_follows_pytorchs() -> None:
    part = peer(product_key_dims=[8, 8], query_dim=8, query_norm="batch")
    oracle_norm = torch.nn.BatchNorm1d(24)
    for _ in range(3):
        x = torch.randn(B, T, D)
        q = part.query_proj(x.flatten(0, 1))
        out = part(x, context())
        torch.testing.assert_close(part.query_norm(q, None), oracle_norm(q), rtol=1e-5, atol=1e-5)
        part.after_update(out.usage)
    torch.testing.assert_close(part.query_norm.running_mean, oracle_norm.running_mean)
    torch.testing.assert_close(part.query_norm.running_var, oracle_norm.running_var)
    x = torch.randn(4, 24)
    torch.testing.assert_close(part.eval().query_norm(x, None), oracle_norm.eval()(x), rtol=1e-5, atol=1e-5)


def test_running_statistics_are_those_of_the_step_however_it_is_cut() -> None:
    whole, cut = (peer(product_key_dims=[8, 8], query_dim=8, query_norm="batch") for _ in range(2))
    x, segments = torch.randn(4, T, D), torch.ones(4, T, dtype=torch.int64)
    segments[1, 3:] = 0
    whole.after_update(whole(x, context(segments, batch=4)).usage)
    parts = [cut(x[i : i + 1], context(segments[i : i + 1], batch=1)).usage["query_moments"] for i in range(4)]
    before = cut.query_norm.running_mean.clone()
    assert torch.equal(before, torch.zeros(24)), "forward alone must not move them"
    cut.after_update({"query_moments": torch.stack(parts).sum(0)})
    torch.testing.assert_close(cut.query_norm.running_mean, whole.query_norm.running_mean)
    torch.testing.assert_close(cut.query_norm.running_var, whole.query_norm.running_var)
    real = whole.query_proj(x[segments > 0])
    torch.testing.assert_close(whole.query_norm.running_mean, 0.1 * real.mean(0))
    torch.testing.assert_close(whole.query_norm.running_var, 0.9 + 0.1 * real.var(0))


@EVERY
def test_counted_flops_and_parameters(fields: dict[str, Any]) -> None:
    part = peer(**{**fields, "query_norm": "none"})
    part.kernels = "reference"
    with FlopCounterMode(display=False) as counter:
        part(torch.randn(B, T, D), context())
    assert part.flops_per_token(T) * B * T == counter.get_total_flops()
    experts, hidden = math.prod(fields["product_key_dims"]), fields.get("expert_hidden_size", 1)
    idle = 2 * (experts - min(experts, 12)) * hidden * D
    assert part.active_parameters() == sum(p.numel() for p in part.parameters()) - idle


def test_roles() -> None:
    part = peer(product_key_dims=[8, 8], query_dim=8, qk_cosine=True)
    roles = parameter_roles(part)
    routing = {name for name, role in roles.items() if role == "router"}
    assert routing == {"query_proj.weight", "keys_0", "keys_1"}
    assert {name for name, role in roles.items() if role == "expert_table"} == {"expert_down", "expert_up"}
    assert (roles["temperature"], roles["query_norm.weight"]) == ("scalar", "norm")
    assert not any(takes_muon(item) for item in named_trainable(part))


def test_start() -> None:
    part = peer(InitConfig(std=0.5, residual="depth"), product_key_dims=[64, 64], query_dim=32, qk_cosine=True)
    assert part.expert_down.std().item() == pytest.approx(0.5, rel=0.02)
    assert part.expert_up.std().item() == pytest.approx(0.5 / 8**0.5, rel=0.02)
    assert part.keys_0.std().item() == pytest.approx(16**-0.5, rel=0.1)
    assert (part.temperature == 32**0.5).all()


def test_dropout_leaves_experts_out_in_training_only() -> None:
    fields: dict[str, Any] = {"product_key_dims": [8, 8], "query_dim": 8}
    part, x = peer(**fields, dropout=0.5), torch.randn(B, T, D)
    assert not torch.equal(part(x, context()).y, part(x, context()).y)
    assert torch.equal(part.eval()(x, context()).y, peer(**fields)(x, context()).y)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"product_key_dims": [8, 8], "num_experts": 63}, "8 x 8 has 64 experts, not 63"),
        ({"product_key_dims": [3, 3, 3], "query_dim": 256}, "256 channels do not divide among 3 axes"),
        ({"product_key_dims": [2, 1], "query_dim": 8}, "cannot pick 4 of 2 experts"),
        ({"product_key_dims": [8, 0]}, "side below 1"),
        ({"product_key_dims": [2, 2, 2, 2, 2]}, "at most 4"),
        ({"product_key_dims": []}, "at least 1"),
    ],
)
def test_what_cannot_be(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**fields)


def test_advice() -> None:
    def advice(**fields: Any) -> list[str]:
        return [problem.message for problem in config(**fields).advice_in(D)]

    assert not advice(product_key_dims=[64, 64])
    assert "see later ones" in advice(product_key_dims=[64, 64], query_norm="batch")[0]
    assert "choose next to nothing" in advice(product_key_dims=[3, 4])[0]


@pytest.mark.slow
def test_a_step_over_a_million_experts_touches_what_it_reads() -> None:
    """Memory beyond the weights stays a small share of a table, and all other rows keep every bit."""
    part = peer(product_key_dims=[1024, 1024], query_dim=8, num_experts_per_tok=16)
    groups: Any = {"expert_table": RoleOverride(update="rowwise_adagrad")}
    optimizer = AdamWConfig(learning_rate=0.1, groups=groups).build(part)
    before, table = part.expert_up.detach().clone(), part.expert_up.numel() * 4
    with LiveBytes() as live:
        views = [p.detach() for p in part.parameters()]  # a view makes the weights known
        weights = live.open_window()
        assert weights == sum(4 * v.numel() for v in views) > 2 * table
        for _ in range(2):
            out = part(torch.randn(1, 64, D), context(batch=1, length=64))
            out.y.square().sum().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    counts = 2 * out.usage["experts"].numel() * 8  # of two steps
    states = sum(t.numel() * 4 for state in optimizer.state.values() for t in state.values())
    assert states < table / 4
    assert live.window_peak - weights - counts - states < table / 8
    moved = (part.expert_up != before).any(1)
    assert 0 < moved.sum() <= 2 * 64 * 3 * 16
    sums = optimizer.state[part.expert_up]["row_sum"]
    assert torch.equal(sums > 0, moved)
