"""Our neural memory is titans-pytorch's, and unrolls a chunk with flash-linear-attention's weights, in fp64.

What maps to what in titans-pytorch's NeuralMemory (norms before it off):

- their ``batch_size`` is our chunk_size, what shares the weights of its gradients, when their ``chunk_size`` is 1; then
  momentum, decay, step sizes and what is read belong to single tokens in both;
- their loss is a mean over a head's channels, ours a sum: their largest step is H times ours;
- their ``qk_rmsnorm`` with gains of H^-½ is our scaling to length 1;
- their memory has gelu between its layers and ours silu: with depth 2 theirs is given a memory with silu;
- gates: to_adaptive_step, to_momentum and to_decay_factor are the three parts of gate_proj and gate_bias;
- their gate and joining of heads come after the memory and are taken out.

With a ``chunk_size`` C above 1 theirs takes one step of decay per chunk, by a gate of the chunk's mean, and reads with
the weights before the chunk, but at its last token with those after it. Ours does the same when the first token of a
chunk has that decay and the others none. Their momentum then also steps once per chunk, while ours adds the momentum to
the weights at every token: for C above 1 no gates make these equal, so that is compared without momentum.

The transformer around theirs is not compared: it adds what the memory says to the stream before the attention, and
writes the stream to the memory, never what the attention says.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import oracles
import pytest
import torch
import torch.nn.functional as F
from layers import grad_of, our_layer
from torch import Tensor, nn
from weights import assert_close

from graft.ops.documents import find_documents
from graft.ops.neural_memory import scan
from graft.ops.neural_memory_chunk import Bases, Memory, Writing, evaluate
from graft.token_mixers.titans_base import Titans
from graft.token_mixers.titans_memory import NeuralMemory

B, N, H, D, T = 2, 3, 4, 10, 17
MAX_STEP, TOLERANCE = 0.3, 1e-10
double = torch.float64


def our_memory(depth: int, chunk_size: int) -> NeuralMemory:
    """With random weights."""
    titans = {"type": "titans", "num_heads": N, "head_dim": H, "position": {"type": "none"}, "chunk_size": chunk_size}
    memory = {
        "memory_depth": depth,
        "memory_intermediate_size": 5 if depth > 1 else None,
        "max_memory_step": MAX_STEP,
        "max_surprise": None,
    }
    part = our_layer(D, {**titans, **memory})
    assert isinstance(part, Titans)
    for parameter in part.memory.parameters():
        nn.init.normal_(parameter, std=0.5)
    return part.memory


class SiluMemory(nn.Module):
    """A memory model for theirs, of our form."""

    def __init__(self, sizes: list[int]):
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(torch.zeros(pair)) for pair in pairwise(sizes)])

    def forward(self, x: Tensor) -> Tensor:
        for index, weight in enumerate(self.weights):
            x = (F.silu(x) if index else x) @ weight
        return x


def their_memory(ours: NeuralMemory, **more: Any) -> nn.Module:
    """The same memory, all weights copied."""
    theirs = (
        oracles.neural_memory()
        .NeuralMemory(
            D,
            heads=N,
            dim_head=H,
            model=SiluMemory(ours.sizes) if len(ours.sizes) > 2 else None,
            default_model_kwargs={"depth": 1},
            mem_model_norm_add_residual=False,
            default_step_transform_max_lr=MAX_STEP * H,
            activation=nn.SiLU(),
            pre_rmsnorm=False,
            qk_rmsnorm=True,
            **more,
        )
        .double()
    )
    theirs.retrieve_gate, theirs.combine_heads = None, nn.Identity()
    pairs = counterparts(ours, theirs)
    with torch.no_grad():
        for norm in (theirs.q_norm, theirs.k_norm):
            norm.gamma.fill_(H**-0.5 - 1).requires_grad_(False)
            norm.rmsnorm.eps = 1e-12 / H  # ours adds 1e-12 to the sum of squares
        for mine, their in pairs:
            their.copy_(mine)
    return theirs


def counterparts(ours: NeuralMemory, theirs: nn.Module, *, grad: bool = False) -> list[tuple[Tensor, Tensor]]:
    """Our parameters (or their gradients) and theirs. Theirs has no other that learns, but for its unused template."""

    of = grad_of if grad else torch.Tensor.detach
    gates = [theirs.to_adaptive_step, theirs.to_momentum, theirs.to_decay_factor]
    weights, biases = of(ours.gate_proj.weight).split(N), of(ours.gate_bias)
    used = [
        (weight, bias, gate[0]) for weight, bias, gate in zip(weights, biases, gates, strict=True) if gate is not None
    ]
    projections = [(ours.q_proj, theirs.to_queries), (ours.k_proj, theirs.to_keys), (ours.v_proj, theirs.to_values)]
    layers = zip(ours.layers, theirs.memory_model_parameters, strict=True)
    return [
        *((of(mine.weight), of(their[0].weight)) for mine, their in projections),
        *((weight, of(gate.weight)) for weight, _, gate in used),
        *((bias, of(gate.bias)) for _, bias, gate in used),
        *((of(ours.get_parameter(name)), of(weight)) for name, weight in layers),
    ]


def read(memory: NeuralMemory, x: Tensor, kernels: Any) -> tuple[Tensor, Memory]:
    documents = find_documents(torch.ones(x.shape[:2], dtype=torch.int64)) if kernels == "reference" else None
    writing, _ = memory.writing(x)
    return memory.read(writing, memory.empty(len(x)), documents, kernels=kernels)


def assert_same_state(memory: Memory, state: Any) -> None:
    """Weights and momentum after the last token."""
    weights, momentum = state.states
    for mine, their in zip(memory.weights, weights.values(), strict=True):
        assert_close(mine.flatten(0, 1), their, "weights at the end", TOLERANCE)
    for mine, their in zip(memory.momentum, momentum.values(), strict=True):
        assert_close(mine.flatten(0, 1), their[0], "momentum at the end", TOLERANCE)


@pytest.mark.parametrize("kernels", ["auto", "reference"])
@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("chunk_size", [1, 4, T])
def test_what_is_read_the_memory_after_it_and_gradients(chunk_size: int, depth: int, kernels: str) -> None:
    ours = our_memory(depth, chunk_size)
    theirs = their_memory(ours, chunk_size=1, batch_size=chunk_size)
    x = torch.randn(B, T, D, dtype=double)
    results = []
    for compute in (lambda x: read(ours, x, kernels), theirs):
        own = x.clone().requires_grad_()
        results.append((own, *compute(own)))
    (x_ours, actual, memory), (x_theirs, expected, state) = results
    assert_close(actual, expected, "read", TOLERANCE)
    assert_same_state(memory, state)
    direction = torch.randn_like(actual)
    actual.backward(direction)
    expected.backward(direction)
    assert_close(x_ours.grad, x_theirs.grad, "gradient of x", TOLERANCE)
    for mine, their in counterparts(ours, theirs, grad=True):
        assert_close(mine, their, f"gradient {tuple(their.shape)}", TOLERANCE)


@torch.no_grad()
def test_in_two_pieces() -> None:
    """Theirs goes on in the middle of a chunk; ours as a whole."""
    ours = our_memory(2, 4)
    theirs, x = their_memory(ours, chunk_size=1, batch_size=4), torch.randn(B, T, D, dtype=double)
    first, state = theirs(x[:, :6])
    second, state = theirs(x[:, 6:], state=state)
    actual, memory = read(ours, x, "auto")
    assert_close(actual, torch.cat((first, second), dim=1), "read", TOLERANCE)
    assert_same_state(memory, state)


@pytest.mark.parametrize("depth", [1, 2])
def test_chunks_with_one_decay_each_without_momentum(depth: int) -> None:
    C, length = 4, 16
    ours = our_memory(depth, C)
    theirs = their_memory(ours, chunk_size=C, batch_size=C, momentum=False)
    x = torch.randn(B, length, D, dtype=double, requires_grad=True)
    writing = in_whole_chunks(ours, x, C)
    at_start: list[Tensor] = []

    def propose(bases: Bases, first: int, last: int) -> Writing:
        at_start.append(evaluate(bases, writing.q_BNCH[:, :, first:last]))
        return Writing(*(y[:, :, first:last] for y in writing))

    after, _ = scan(propose, ours.empty(B), ours.start(), None, length=length, chunk_size=C)
    last = torch.arange(length) % C == C - 1
    actual = torch.where(last[:, None], after, torch.cat(at_start, dim=2)).transpose(1, 2).flatten(-2)
    expected, _ = theirs(x)
    assert_close(actual, expected, "read", TOLERANCE)
    learned = [ours.get_parameter(name) for name in ours.layers]
    direction = torch.randn_like(actual)
    got = torch.autograd.grad(actual, (x, *learned), direction)
    wanted = torch.autograd.grad(expected, (x, *theirs.memory_model_parameters), direction)
    for mine, their in zip(got, wanted, strict=True):
        assert_close(mine, their, f"gradient {tuple(their.shape)}", TOLERANCE)


def in_whole_chunks(ours: NeuralMemory, x: Tensor, chunk_size: int) -> Writing:
    """What x writes, where a chunk decays by the gate of its mean, at its first token alone, and has no momentum."""
    writing, _ = ours.writing(x)
    mean = x.unflatten(1, (-1, chunk_size)).mean(2)
    gate = F.linear(mean, ours.gate_proj.weight[2 * N :], ours.gate_bias[2])
    kept = F.pad(F.logsigmoid(-gate)[:, :, None], (0, 0, 0, chunk_size - 1)).flatten(1, 2)
    none = torch.full_like(writing.log_momentum_BNC, -300.0)
    return writing._replace(log_keep_BNC=kept.transpose(1, 2), log_momentum_BNC=none)


def test_the_weights_of_a_chunk_are_flash_linear_attentions() -> None:
    """A memory of one matrix, which has a past: ``M_t = β_t M + f_t S − Σ_j G_tj ∇_j`` with their β, f and G.

    Their memory itself has layer norms in its loss and in what it reads, which ours has not: the unrolled recurrences
    of decay and momentum are what the two share.
    """
    q, k, v = (torch.randn(B, N, T, H, dtype=double) for _ in range(3))
    theta, alpha, eta = (torch.rand(B, N, T, dtype=double) * most for most in (0.2, 0.3, 0.9))
    M, S = (torch.randn(B, N, H, H, dtype=double) for _ in range(2))
    inputs = [x.requires_grad_() for x in (q, k, v, theta, alpha, eta, M, S)]

    writing = Writing(q, k, v, theta, eta.log(), (1 - alpha).log())
    past, unused = Memory((M,), (S,), (M,)), (torch.zeros_like(M[:1]),)
    y, memory = scan(lambda *_: writing, past, unused, None, length=T, chunk_size=T)
    columns = [x[..., None] for x in (theta, alpha, eta)]
    beta, _, f, _, g, G, m_T, n_T = oracles.fla("titans").combine_params(*columns, T)
    delta = 2 * (k @ M - v)
    expected = beta[..., None] * (q @ M) + f[..., None] * (q @ S) - ((q @ k.mT) * G) @ delta
    after = beta[..., -1, None, None] * M + f[..., -1, None, None] * S - (g[..., None] * k).mT @ delta
    momentum = m_T[..., None, None] * S - (n_T[..., None] * k).mT @ delta

    actual, wanted = (y, *memory.weights, *memory.momentum), (expected, after, momentum)
    directions = [torch.randn_like(x) for x in wanted]
    gradients = [torch.autograd.grad(results, inputs, directions, retain_graph=True) for results in (actual, wanted)]
    for index, (a, b) in enumerate(zip((*actual, *gradients[0]), (*wanted, *gradients[1]), strict=True)):
        assert_close(a, b, f"result or gradient {index}", TOLERANCE)
