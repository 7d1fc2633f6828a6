"""Decoding with compiled layers: the same logits as without, past the end of a window's ring and of every buffer."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from graft.config.model import ModelConfig
from graft.model import Model, build_model

V = 31


def model() -> Model:
    """Sliding and global attention, sandwich norms, a tied and soft-capped head, two loops; far from its start."""
    attention = {"type": "attention", "num_heads": 4, "num_kv_heads": 2, "position": {"type": "rope"}}
    mlp = {"type": "mlp", "intermediate_size": 24, "activation": "gelu_tanh"}
    config = {
        "hidden_size": 16,
        "num_layers": 4,
        "loops": 2,
        "norm": {"type": "rms_norm"},
        "norm_placement": "sandwich",
        "blocks": {"slide": [{**attention, "sliding_window": 5}, mlp], "global": [attention, mlp]},
        "layout": ["slide", "global"],
        "head": {"logit_softcap": 20.0, "pad_vocab_to_multiple_of": 8},
    }
    made = build_model(ModelConfig.model_validate(config), V, seed=0).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return made


@torch.inference_mode()
def logits(made: Model, ids: Tensor, prefill: int) -> Tensor:
    """[B, T − prefill, V]: a prefill, then token by token."""
    state = made.init_state(ids.shape[0], ids.shape[1])
    _, state = made.decode(ids[:, :prefill], state)
    outs: list[Tensor] = []
    for token in ids[:, prefill:].split(1, dim=1):
        out, state = made.decode(token, state)
        outs.append(out.clone())
    return torch.cat(outs, dim=1)


def runs() -> list[tuple[Tensor, int]]:
    """Ids and how many of them the prefill takes: two lengths, so that sizes change, and two rows."""
    return [(torch.randint(V, (1, 14)), 3), (torch.randint(V, (1, 19)), 2), (torch.randint(V, (2, 14)), 7)]


@pytest.mark.slow
def test_compiled_decoding_gives_the_same_logits(compiling: None) -> None:
    from torch._dynamo.utils import counters

    made, given = model(), runs()
    expected = [logits(made, *run) for run in given]
    made.set_runtime(compile_decode=True)
    counters.clear()
    for run, wanted in zip(given, expected, strict=True):
        torch.testing.assert_close(logits(made, *run), wanted, rtol=1e-4, atol=1e-4)
    assert counters["stats"]["unique_graphs"] > 0, "nothing was compiled"
    assert not counters["graph_break"]
    made.set_runtime(compile_decode=False)
    assert torch.equal(logits(made, *given[0]), expected[0])


@pytest.mark.slow
def test_compiled_decoding_in_bf16_is_as_close_to_fp32_as_plain(compiling: None) -> None:
    exact, rounded, (ids, prefill) = model(), model().to(torch.bfloat16), runs()[0]
    exact.load_state_dict({name: tensor.float() for name, tensor in rounded.state_dict().items()})
    wanted, plain = logits(exact, ids, prefill), logits(rounded, ids, prefill)
    rounded.set_runtime(compile_decode=True)
    compiled = logits(rounded, ids, prefill)
    assert not torch.equal(compiled, plain), "fp32 sums of whole rows round differently"
    assert (compiled - wanted).square().mean() < 1.5 * (plain - wanted).square().mean()


def test_the_choice_leaves_names_and_training_alone(compiling: None) -> None:
    made, ids = model(), torch.randint(V, (2, 6))
    names, before = list(made.state_dict()), made(ids)
    made.set_runtime(compile_decode=True)
    assert list(made.state_dict()) == names
    assert made.execution.compile_decode
    assert torch.equal(made(ids), before)


def test_padded_prompts_are_not_compiled_anew_at_every_length(compiling: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.utils import counters

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))  # traces alone
    attention = {"type": "attention", "num_heads": 2, "position": {"type": "rope"}}
    config = {"hidden_size": 8, "num_layers": 1, "norm": {"type": "rms_norm"}, "blocks": {"b": [attention]}}
    made = build_model(ModelConfig.model_validate(config), V, seed=0).eval()
    ids, segments = torch.randint(V, (2, 4)), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    made.set_runtime(compile_decode=True)
    counters.clear()
    graphs: list[int] = []
    with torch.inference_mode():
        _, state = made.decode(ids, made.init_state(2, 16), segment_ids_BS=segments)
        for _ in range(7):
            _, state = made.decode(ids[:, :1], state, segment_ids_BS=segments[:, -1:])
            graphs.append(counters["stats"]["unique_graphs"])
    assert 0 < graphs[3] == graphs[-1], "the first lengths teach that lengths change"
