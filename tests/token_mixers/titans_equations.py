"""What the tests of Titans share: small parts, their surroundings, and the paper's equations in loops."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from graft.config.model import InitConfig
from graft.initialization import initialize
from graft.linears.dense_config import DenseConfig
from graft.norms.rms_norm_config import RMSNormConfig
from graft.part import Context, Site
from graft.positions.base import tables_for
from graft.token_mixers.titans_base import Titans
from graft.token_mixers.titans_config import TitansConfig

CPU = torch.device("cpu")
D, N, H = 12, 2, 4
FORMS: dict[str, dict[str, Any]] = {
    "mac": {"form": "mac"},
    "mag": {"form": "mag", "sliding_window": 5, "conv_size": 3},
    "mal": {"form": "mal", "sliding_window": 3, "memory_depth": 1},
    "mac, alibi": {"form": "mac", "position": {"type": "alibi"}, "num_persistent_tokens": 0},
    "mag, alibi": {"form": "mag", "sliding_window": 4, "position": {"type": "alibi"}, "qk_norm": {"type": "rms_norm"}},
}

ROWS = torch.tensor(
    [
        [7, 7, 7, 7, 7, 7, 3, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 2, 2],
        [0, 0, 0, 5, 5, 5, 5, 5, 5, 8, 8, 8, 8, 8, 8, 8, 8, 8, 0],
    ]
)
"""Packed documents of several segments of 4, with padding at either end."""


def titans_config(**fields) -> TitansConfig:
    fields = {"num_heads": N, "head_dim": H, "chunk_size": 4, "num_persistent_tokens": 2, **fields}
    if "position" not in fields:
        fields["position"] = {"type": "rope"}
    return TitansConfig.model_validate({"type": "titans", **fields})


def site(*, causal=True) -> Site:
    return Site(D, 0, 2, 4, causal, RMSNormConfig(), DenseConfig(), InitConfig(std=0.3))


def titans_part(*, causal=True, **fields) -> Titans:
    part = titans_config(max_memory_step=0.3, **fields).build(site(causal=causal))
    initialize(part, seed=1)
    with torch.no_grad():
        for parameter in part.parameters():  # gates and norms that differ between heads and channels
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return part


def context(B, T, segments=None, positions=None, *, causal=True) -> Context:
    if positions is None:
        positions = torch.arange(T).expand(B, T)
    return Context(torch.zeros(B, T, dtype=torch.int64), positions, segments, causal)


def positions_of(segments: torch.Tensor) -> torch.Tensor:
    """Real positions of the same document before each column, counted one by one."""
    rows = []
    for row in segments.tolist():
        seen: dict[int, int] = {}
        rows.append([seen.setdefault(d, 0) for d in row if seen.update({d: seen.get(d, -1) + 1}) is None])
    return torch.tensor(rows).masked_fill(segments == 0, 0)


def rms(x, norm):
    return x / (x.square().mean(-1, keepdim=True) + norm.config.eps).sqrt() * norm.weight


class Equations:
    """One document of one row, token by token: equations 8-15 and 19-31, all gradients of the memory by autograd."""

    def __init__(self, part: Any):
        self.part, self.config = part, part.config
        self.weights = [getattr(part.memory, name) for name in part.memory.layers]
        self.momentum = [torch.zeros_like(w) for w in self.weights]
        self.base = self.weights

    @staticmethod
    def apply(weights, x_NH):
        for layer, weight in enumerate(weights):
            x_NH = torch.einsum("nh,nhf->nf", F.silu(x_NH) if layer else x_NH, weight)
        return x_NH

    def projected(self, x_TD, t, *, ahead=0) -> list[torch.Tensor]:
        """q, k, v of token t: SiLU after the (convolved) projection, q and k of length 1; so many taps lie ahead."""
        found: list[torch.Tensor] = []
        for i, name in enumerate(("q_proj", "k_proj", "v_proj")):
            W = getattr(self.part.memory, name).weight
            y = W @ x_TD[t]
            if self.part.memory.conv is not None:
                taps = self.part.memory.conv.weight[i * N * H : (i + 1) * N * H]
                places = [(tap, t + ahead - (taps.shape[1] - 1 - tap)) for tap in range(taps.shape[1])]
                y = torch.stack([taps[:, tap] * (W @ x_TD[s]) for tap, s in places if 0 <= s < len(x_TD)]).sum(0)
            y = F.silu(y).view(N, H)
            found.append(y / y.norm(dim=-1, keepdim=True) if i < 2 else y)
        return found

    def write(self, x_D, k, v):
        memory = self.part.memory
        step, eta, alpha = ((memory.gate_proj.weight @ x_D).view(3, N) + memory.gate_bias).sigmoid()[..., None, None]
        here = [w.clone() for w in self.base]  # the gradient at given k and v, which in mac come from the memory too
        loss = (self.apply(here, k) - v).square().sum()
        pushed = torch.autograd.grad(loss, here, create_graph=True)
        length = torch.cat([g.flatten(-2) for g in pushed], -1).norm(dim=-1)[..., None, None]
        pushed = [g * (self.config.max_surprise / length).clamp_max(1.0) for g in pushed]
        theta = self.config.max_memory_step * step
        self.momentum = [eta * s - theta * g for s, g in zip(self.momentum, pushed, strict=True)]
        self.weights = [(1 - alpha) * w + s for w, s in zip(self.weights, self.momentum, strict=True)]

    def attend(self, x_TD, t, reach, extra=()):
        """Attention of token t to the persistent tokens, to ``extra`` (vector, position), and to its past."""
        part = self.part

        def head(name, x, position, norm):
            y = (getattr(part, name).weight @ x).view(1, 1, N, H)
            y = y if norm is None else rms(y, norm)
            return (y if position is None else part.position.encode(y, tables_for(part.position, {}, position)))[0, 0]

        def at(s):
            return torch.tensor([[s]])

        q = head("q_proj", x_TD[t], at(t), part.q_norm)
        seen = [(x_TD[s], s) for s in reach] + list(extra)
        rates, slopes = part.position.rates(part.layer_idx, CPU), part.position.slopes(CPU)
        scores: list[torch.Tensor] = []
        for x, s in seen:
            product = q * head("k_proj", x, at(s), part.k_norm)
            product = product if rates is None else product * torch.exp(-rates.double() * abs(t - s))
            score = product.sum(-1) / H**0.5
            scores.append(score if slopes is None else score - slopes * abs(t - s))
        values = [head("v_proj", x, None, None) for x, _ in seen]
        if part.persistent is not None:
            scores += [(q * k).sum(-1) / H**0.5 for k in part.persistent.k]
            values += list(part.persistent.v)
        weights = torch.stack(scores).softmax(0)
        return torch.einsum("sn,snh->nh", weights, torch.stack(values)).flatten()

    def joined(self, y, read):
        part = self.part
        return part.o_proj.weight @ (rms(y, part.attention_norm) * rms(read, part.memory_norm).sigmoid())

    def mac(self, x_TD):
        retrieved: list[Any] = []
        for t in range(len(x_TD)):
            first = t // self.config.chunk_size * self.config.chunk_size
            if t == first:
                self.base, retrieved = self.weights, []
            h = self.apply(self.base, self.projected(x_TD, t)[0]).flatten()
            retrieved.append((self.part.retrieved_proj.weight @ h, t))
            y = self.attend(x_TD, t, range(first, t + 1), retrieved)
            y_D = self.part.y_proj.weight @ y
            q, k, v = self.projected(y_D[None], 0)
            self.write(y_D, k, v)
            yield self.joined(y, self.apply(self.weights, q).flatten())

    def read_all(self, x_TD):
        for t in range(len(x_TD)):
            if t % self.config.chunk_size == 0:
                self.base = self.weights
            q, k, v = self.projected(x_TD, t)
            self.write(x_TD[t], k, v)
            yield self.apply(self.weights, q).flatten()

    def mag(self, x_TD):
        for t, read in enumerate(self.read_all(x_TD)):
            reach = range(max(0, t - self.config.sliding_window + 1), t + 1)
            yield self.joined(self.attend(x_TD, t, reach), read)

    def mal(self, x_TD):
        part = self.part
        u_TD = torch.stack([part.y_proj.weight @ rms(read, part.memory_norm) for read in self.read_all(x_TD)])
        for t in range(len(x_TD)):
            reach = range(max(0, t - self.config.sliding_window + 1), t + 1)
            yield part.o_proj.weight @ self.attend(u_TD, t, reach)


class BothWays(Equations):
    """The same of an encoder: everything that is in an order is done in both, token by token."""

    def one_way(self, x_TD, order):
        """What the attention of MAC says (else None) and what the memory answers, by token, in this order."""
        Equations.__init__(self, self.part)
        said: dict[int, Any] = {}
        answers: dict[int, torch.Tensor] = {}
        for first in range(0, len(order), self.config.chunk_size):
            self.base, segment = self.weights, order[first : first + self.config.chunk_size]
            for t in segment:
                said[t], (written, (q, k, v)) = self.context_of(x_TD, t, segment)
                self.write(written, k, v)
                answers[t] = self.apply(self.weights, q).flatten()
        return said, answers

    def context_of(self, x_TD, t, segment):
        """What the attention says, what is written of token t, and its projections."""
        if self.config.form != "mac":
            taps = self.config.conv_size or 1
            return None, (x_TD[t], self.projected(x_TD, t, ahead=(taps - 1) // 2))
        retrieved = [(self.part.retrieved_proj.weight @ self.retrieve(x_TD, s), s) for s in segment]
        y = self.attend(x_TD, t, segment, retrieved)
        y_D = self.part.y_proj.weight @ y
        return y, (y_D, self.projected(y_D[None], 0))

    def retrieve(self, x_TD, s):
        return self.apply(self.base, self.projected(x_TD, s)[0]).flatten()

    def __call__(self, x_TD) -> torch.Tensor:
        T, part = len(x_TD), self.part
        (said, answers), (said_back, answers_back) = (
            self.one_way(x_TD, order) for order in (list(range(T)), list(range(T))[::-1])
        )
        reads = [(answers[t] + answers_back[t]) / 2 for t in range(T)]
        if self.config.form == "mac":
            return torch.stack([self.joined((said[t] + said_back[t]) / 2, reads[t]) for t in range(T)])
        W = self.config.sliding_window
        near = [range(max(0, t - W + 1), min(T, t + W)) for t in range(T)]
        if self.config.form == "mag":
            return torch.stack([self.joined(self.attend(x_TD, t, near[t]), reads[t]) for t in range(T)])
        u_TD = torch.stack([part.y_proj.weight @ rms(read, part.memory_norm) for read in reads])
        return torch.stack([part.o_proj.weight @ self.attend(u_TD, t, near[t]) for t in range(T)])
