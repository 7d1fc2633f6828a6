"""What a Titans layer learns of its memory, and its persistent tokens."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graft.config.roles import Role
from graft.initialization import Rng, normal_
from graft.linears.joint import joint_linear
from graft.ops.documents import Documents
from graft.ops.kernels import Kernels
from graft.ops.neural_memory import scan, width_of
from graft.ops.neural_memory_chunk import Bases, Memory, Weights, Writing
from graft.ops.prefix_attention import Prefix
from graft.ops.short_conv import ConvState
from graft.part import Site
from graft.token_mixers.short_conv import ShortConv
from graft.token_mixers.titans_config import TitansConfig

GATE_STARTS = {"step": 0.0, "momentum": 0.0, "forget": -4.0}
"""Gates before their sigmoid at the start: half the largest step, η = 1/2, and a memory that forgets slowly."""


class PersistentTokens(nn.Module):
    """Learned keys and values that stand before every sequence (2501.00663, section 3.3), without positions.

    Deviation: keys and values per head, not token vectors that are projected.

    Args:
        count: P.
        num_heads: N.
        head_dim: H.
        init_std: standard deviation at the start.
    """

    role: Role = "memory_bank"

    def __init__(self, count: int, num_heads: int, head_dim: int, init_std: float):
        super().__init__()
        self.init_std = init_std
        self.k = nn.Parameter(torch.empty(count, num_heads, head_dim))
        self.v = nn.Parameter(torch.empty(count, num_heads, head_dim))

    def init_parameters(self, rng: Rng) -> None:
        normal_(self.k, self.init_std, rng("k"))
        normal_(self.v, self.init_std, rng("v"))

    def forward(self) -> Prefix:
        return Prefix(self.k, self.v)


class NeuralMemory(nn.Module):
    """The projections, gates and learned start of a memory whose weights learn at test time.

    ``q, k, v = silu([conv](x W))`` per head, q and k scaled to length 1; ``θ = max_memory_step · σ``, ``η = σ`` and
    ``α = σ`` of linear maps of x, per head. The learned start are the weights ``layer_1 …``, [N, in, out], which have
    the role of a bank: no weight decay (it would pull what an empty memory says to nothing), and no Muon.

    Args:
        config: sizes and form.
        site: the surroundings.
        head_dim: H.
    """

    def __init__(self, config: TitansConfig, site: Site, head_dim: int):
        super().__init__()
        N, D, size = config.num_heads, site.hidden_size, config.num_heads * head_dim
        self.num_heads, self.chunk_size, self.max_step = N, config.chunk_size, config.max_memory_step
        self.max_surprise = config.max_surprise
        between = config.memory_intermediate_size or head_dim
        self.sizes = [head_dim, *[between] * (config.memory_depth - 1), head_dim]
        self.q_proj = site.make_linear(D, size, role="titans")
        self.k_proj = site.make_linear(D, size, role="titans")
        self.v_proj = site.make_linear(D, size, role="titans")
        self.gate_proj = site.make_linear(D, 3 * N, role="titans")
        self.gate_bias = nn.Parameter(torch.empty(3, N))
        self.conv = ShortConv(3 * size, config.conv_size, causal=site.causal) if config.conv_size else None
        self.layers = [f"layer_{i}" for i in range(1, len(self.sizes))]
        for name, (rows, columns) in zip(self.layers, pairwise(self.sizes), strict=True):
            self.register_parameter(name, nn.Parameter(torch.empty(N, rows, columns)))
        self.param_roles: dict[str, Role] = {"gate_bias": "scalar", **dict.fromkeys(self.layers, "memory_bank")}

    def init_parameters(self, rng: Rng) -> None:
        with torch.no_grad():
            for row, value in zip(self.gate_bias, GATE_STARTS.values(), strict=True):
                row.fill_(value)
        for name in self.layers:
            weight = self.get_parameter(name)
            normal_(weight, weight.shape[1] ** -0.5, rng(name))

    def start(self) -> Weights:
        """The weights every document begins with, [1, N, in, out] per layer, fp32 or wider."""
        weights = (self.get_parameter(name) for name in self.layers)
        return tuple(w.to(torch.promote_types(w.dtype, torch.float32))[None] for w in weights)

    def empty(self, batch_size: int) -> Memory:
        """The memory a row begins with."""
        rows = tuple(w.expand(batch_size, -1, -1, -1) for w in self.start())
        return Memory(rows, tuple(torch.zeros_like(w) for w in rows), rows)

    def empty_state(self, batch_size: int, *, device: torch.device, dtype: torch.dtype) -> Memory:
        """Room for a memory, in fp32 or wider; the first document overwrites it."""
        wide = torch.promote_types(dtype, torch.float32)

        def zeros() -> Weights:
            shapes = pairwise(self.sizes)
            return tuple(torch.zeros((batch_size, self.num_heads, i, o), device=device, dtype=wide) for i, o in shapes)

        return Memory(zeros(), zeros(), zeros())

    def query(self, x_BTD: Tensor) -> Tensor:
        """q [B, N, T, H] alone."""
        return self._unit(self._heads(F.silu(self.q_proj(x_BTD))))

    def writing(
        self,
        x_BTD: Tensor,
        segment_ids_BT: Tensor | None = None,
        conv: ConvState | None = None,
        *,
        kernels: Kernels = "auto",
    ) -> tuple[Writing, ConvState | None]:
        """Queries, keys, values and gates of x, and the convolution's state after it."""
        qkv = torch.cat(joint_linear(x_BTD, (self.q_proj, self.k_proj, self.v_proj)), dim=-1)
        if self.conv is not None:
            qkv, conv = self.conv(qkv, segment_ids_BT, conv, kernels=kernels)
        q, k, v = (self._heads(y) for y in F.silu(qkv).chunk(3, dim=-1))
        gates = self.gate_proj(x_BTD).unflatten(-1, (3, self.num_heads))
        gates = gates.to(torch.promote_types(gates.dtype, torch.float32)) + self.gate_bias
        step, momentum, forget = gates.movedim(1, -1).unbind(1)
        kept = F.logsigmoid(-forget)
        return Writing(
            self._unit(q), self._unit(k), v, self.max_step * step.sigmoid(), F.logsigmoid(momentum), kept
        ), conv

    def _heads(self, x_BTA: Tensor) -> Tensor:
        """[B, T, N·H] to [B, N, T, H], fp32 or wider."""
        wide = torch.promote_types(x_BTA.dtype, torch.float32)
        return x_BTA.unflatten(-1, (self.num_heads, -1)).transpose(1, 2).to(wide)

    @staticmethod
    def _unit(x: Tensor) -> Tensor:
        """Scaled to length 1; zeros stay zeros."""
        return x * (x.square().sum(-1, keepdim=True) + 1e-12).rsqrt()

    def read(
        self, writing: Writing, memory: Memory, documents: Documents | None, *, kernels: Kernels
    ) -> tuple[Tensor, Memory]:
        """What all positions read, [B, T, N·H] in fp32 or wider, when what they write is known."""

        width = width_of(self.chunk_size, kernels)
        pieces = [x.split(width, dim=2) for x in writing]

        def propose(_: Bases, first: int, _last: int) -> Writing:
            return Writing(*(x[first // width] for x in pieces))

        length = writing.k_BNCH.shape[2]
        y_BNTH, memory = scan(
            propose, memory, self.start(), documents, length=length, chunk_size=self.chunk_size,
            max_surprise=self.max_surprise, kernels=kernels,
        )  # fmt: skip
        return y_BNTH.transpose(1, 2).flatten(-2), memory

    def scan_flops(self, seq_len: int) -> int:
        """Forward FLOPs of reading one document of ``seq_len`` positions once, in the chunked form and without the
        projections: exact.
        """
        pairs = list(pairwise(self.sizes))
        weights, ends = sum(i * o for i, o in pairs), sum(i + o for i, o in pairs)
        back = sum(i * o for i, o in pairs[1:])
        total = 0
        for first in range(0, seq_len, self.chunk_size):
            c = min(self.chunk_size, seq_len - first)
            surprise = 2 * c * (weights + back)
            read = 4 * c * weights + 2 * c * c * ends
            total += surprise + 2 * c**3 + read + 4 * c * weights  # the last: weights and momentum after the chunk
        return self.num_heads * total
