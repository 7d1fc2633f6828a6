"""The model as a whole: building, sharing numbers, loops, tying, runtime choices, decoding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from graft.config.model import ModelConfig
from graft.errors import ConfigError
from graft.model import Model, build_model
from graft.part import Context, parameter_roles
from graft.positions.rope import Rope

V = 19
ATTENTION = {"type": "attention", "num_heads": 2, "position": {"type": "rope"}}
MLP = {"type": "mlp", "intermediate_size": 12}


def config(parts: list[dict[str, Any]] | None = None, **model: Any) -> ModelConfig:
    base = {"hidden_size": 8, "num_layers": 2, "norm": {"type": "rms_norm"}}
    blocks = model.pop("blocks", {"decoder": parts or [ATTENTION, MLP]})
    return ModelConfig.model_validate({**base, "blocks": blocks, **model})


def build(model: ModelConfig | None = None, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> Model:
    return build_model(model or config(), V, seed=seed, dtype=dtype)


def loud(model: Model) -> Model:
    """Every parameter far from its start."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def tokens(rows: int = 2, length: int = 7) -> Tensor:
    return torch.randint(V, (rows, length))


def step(model: Model, ids: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(ids).square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_forward_by_hand() -> None:
    model, ids = loud(build()), tokens()
    x = model.embedding.weight[ids]
    positions = torch.arange(7).expand(2, 7)
    for block in model.blocks():
        for _, branch in block.branches():
            x = x + branch.part(branch.norm(x), Context(ids, positions)).y
    torch.testing.assert_close(model(ids), model.final_norm(x) @ model.embedding.weight.T)


def test_the_same_seed_gives_the_same_numbers_and_another_does_not() -> None:
    first, again, other = (dict(build(seed=seed).named_parameters()) for seed in (3, 3, 4))
    assert all(torch.equal(p, again[name]) for name, p in first.items())
    assert not torch.equal(first["embedding.weight"], other["embedding.weight"])


def test_building_touches_no_global_generator() -> None:
    before = torch.get_rng_state()
    build()
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    "other",
    [
        config([MLP, ATTENTION, MLP]),
        config([ATTENTION, {**MLP, "activation": "gelu"}], head={"tie_word_embeddings": False}),
        config(norm={"type": "layer_norm"}, loops=3),
        config([{**ATTENTION, "qk_norm": {"type": "rms_norm"}, "sliding_window": 3}, MLP], num_layers=4),
    ],
    ids=["extra part", "head", "norm and loops", "depth"],
)
def test_two_networks_share_the_numbers_of_what_they_share(other: ModelConfig) -> None:
    ours, theirs = dict(build().named_parameters()), dict(build(other).named_parameters())
    shared = [name for name in ours if name in theirs]
    assert sum("_proj" in name for name in shared) == 14  # 7 matrices in each of the two layers
    assert all(torch.equal(ours[name], theirs[name]) for name in shared)


def test_names_and_roles() -> None:
    roles = parameter_roles(build(config(head={"tie_word_embeddings": False, "bias": True})))
    assert roles["embedding.weight"] == "embedding"
    assert roles["layers.1.attention.part.q_proj.weight"] == "attention"
    assert roles["layers.0.mlp.part.down_proj.weight"] == "mlp"
    assert roles["layers.0.mlp.norm.weight"] == roles["final_norm.weight"] == "norm"
    assert roles["head.weight"] == "head"
    assert roles["head.bias"] == "bias"


def test_meta_device_allocates_nothing() -> None:
    model = build_model(config(hidden_size=4096, num_layers=64), 2**18, seed=0, device="meta")
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert model.num_parameters() == sum(p.numel() for p in model.parameters())


def test_tied_is_one_parameter_and_untied_two() -> None:
    tied, untied = build(), build(config(head={"tie_word_embeddings": False}))
    assert tied.head_weight() is tied.embedding.weight
    assert untied.head_weight() is untied.head.weight
    assert untied.num_parameters() - tied.num_parameters() == V * 8


def test_loops_share_weights_and_equal_a_deeper_network_with_copied_weights() -> None:
    looped = loud(build(config(loops=2)))
    deep = build(config(num_layers=4))
    assert looped.num_parameters() == build().num_parameters()
    state = looped.state_dict()
    for name in [n for n in state if n.startswith("layers.")]:
        _, index, rest = name.split(".", 2)
        state[f"layers.{int(index) + 2}.{rest}"] = state[name]
    deep.load_state_dict(state)
    ids = tokens()
    torch.testing.assert_close(looped(ids), deep(ids))


def test_depth_scaled_start_counts_loops() -> None:
    plain, scaled = build(config(loops=3)), build(config(loops=3, init={"residual": "depth"}))
    branches = 3 * 2 * 2
    for name, parameter in plain.named_parameters():
        factor = branches**-0.5 if "o_proj" in name or "down_proj" in name else 1.0
        torch.testing.assert_close(scaled.get_parameter(name), parameter * factor, rtol=1e-6, atol=0)


def test_layout_and_overrides_reach_the_layers() -> None:
    blocks = {"slide": [{**ATTENTION, "sliding_window": 2}, MLP], "global": [ATTENTION, MLP]}
    overrides = {"-1": {"attention.position": {"type": "rope", "theta": 77.0}}}
    model = build(config(blocks=blocks, layout=["slide", "global"], num_layers=4, overrides=overrides))
    attentions = [part for part in model.parts() if hasattr(part, "q_proj")]
    assert [part.sliding_window for part in attentions] == [2, None, 2, None]
    assert [part.position.config.theta for part in attentions] == [1e4, 1e4, 1e4, 77.0]


def test_tables_are_computed_once_for_equal_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[float] = []
    original = Rope.tables

    def counting(self: Rope, positions_BT: Tensor) -> Any:
        calls.append(self.config.theta)
        return original(self, positions_BT)

    monkeypatch.setattr(Rope, "tables", counting)
    far = {**ATTENTION, "position": {"type": "rope", "theta": 5.0}}
    build(config(blocks={"a": [ATTENTION], "b": [far]}, layout=["a", "b"], num_layers=6, loops=2))(tokens())
    assert sorted(calls) == [5.0, 1e4]


def test_bidirectional_sees_both_sides_and_cannot_decode() -> None:
    model = loud(build(config(bidirectional=True)))
    ids = tokens(1)
    changed = ids.clone()
    changed[0, -1] = (ids[0, -1] + 1) % V
    assert not torch.allclose(model(ids)[0, 0], model(changed)[0, 0])
    with pytest.raises(ConfigError, match="bidirectional"):
        model.init_state(1, 8)


@pytest.mark.parametrize("sizes", [[7], [1] * 7, [3, 1, 2, 1]])
def test_decoding_equals_one_forward_in_every_loop(sizes: list[int]) -> None:
    slide = {**ATTENTION, "sliding_window": 3}
    blocks = {"a": [slide, MLP], "b": [ATTENTION, MLP]}
    position = {"position": {"type": "learned", "max_seq_len": 7}}
    model = loud(build(config(blocks=blocks, layout=["a", "b"], loops=2, embedding=position)))
    ids = tokens()
    state = model.init_state(2, 7)
    pieces = []
    for chunk in ids.split(sizes, dim=1):
        logits, state = model.decode(chunk, state)
        pieces.append(logits)
    torch.testing.assert_close(torch.cat(pieces, 1), model(ids))
    assert state.length == 7


def test_last_only() -> None:
    model, ids = loud(build()), tokens()
    whole, _ = model.decode(ids, model.init_state(2, 7))
    last, _ = model.decode(ids, model.init_state(2, 7), last_only=True)
    torch.testing.assert_close(last, whole[:, -1:])


def test_left_padded_prompts_decode_as_alone() -> None:
    model, ids = loud(build()), tokens()
    segments = torch.ones_like(ids)
    segments[0, :3] = 0
    state = model.init_state(2, 8)
    logits, state = model.decode(ids, state, segment_ids_BS=segments)
    torch.testing.assert_close(logits[0, 3:], model(ids[:1, 3:])[0])
    new = tokens(2, 1)
    logits, _ = model.decode(new, state)
    torch.testing.assert_close(logits[0, 0], model(torch.cat([ids[:1, 3:], new[:1]], 1))[0, -1])
    torch.testing.assert_close(logits[1, 0], model(torch.cat([ids[1:], new[1:]], 1))[0, -1])


def test_positions_restart_per_document_and_may_be_given() -> None:
    model = loud(build(config(embedding={"position": {"type": "learned", "max_seq_len": 7}})))
    ids, segments = tokens(1), torch.tensor([[1, 1, 1, 2, 2, 2, 2]])
    packed = model(ids, segment_ids_BT=segments)
    torch.testing.assert_close(packed[:, 3:], model(ids[:, 3:]))
    given = model(ids, segment_ids_BT=segments, positions_BT=torch.tensor([[0, 1, 2, 0, 1, 2, 3]]))
    torch.testing.assert_close(given, packed)
    assert not torch.allclose(model(ids, segment_ids_BT=segments, positions_BT=torch.arange(7)[None]), packed)


def test_checkpointing_recomputes_layers_and_changes_no_number() -> None:
    parts = [{**ATTENTION, "residual_dropout": 0.3}, {**MLP, "dropout": 0.3}]
    model, ids = loud(build(config(parts))), tokens()
    calls: list[int] = []
    for block in model.blocks():
        block.register_forward_pre_hook(lambda *_: calls.append(1))
    torch.manual_seed(5)
    plain = step(model, ids)
    assert len(calls) == 2
    model.set_runtime(activation_checkpointing="block")
    torch.manual_seed(5)
    recomputed = step(model, ids)
    assert len(calls) == 6
    torch.testing.assert_close(recomputed, plain, rtol=0, atol=0)


def test_runtime_choices_reach_the_parts_and_keep_each_other() -> None:
    model = build()
    model.set_runtime(kernels="reference", loss_chunk_bytes=2**20)
    model.set_runtime(activation_checkpointing="block")
    assert {part.kernels for part in model.parts()} == {"reference"}
    assert model.execution.kernels == "reference"
    assert model.execution.loss_chunk_bytes == 2**20
    assert model.execution.activation_checkpointing == "block"


@pytest.mark.slow
def test_compiled_equals_eager_without_recompiling_per_layer(compiling: None) -> None:
    from torch._dynamo.utils import counters

    blocks = {"a": [{**ATTENTION, "sliding_window": 3}, MLP], "b": [ATTENTION, MLP]}
    model, ids = loud(build(config(blocks=blocks, layout=["a", "b"], num_layers=6, loops=2))), tokens()
    eager = step(model, ids)
    model.set_runtime(compile=True)
    counters.clear()
    torch.testing.assert_close(step(model, ids), eager)
    assert counters["stats"]["unique_graphs"] == 2  # one per kind of layer
    assert not counters["graph_break"]
    model.set_runtime(compile=False, activation_checkpointing="block")
    torch.testing.assert_close(step(model, ids), eager)
    assert counters["stats"]["unique_graphs"] == 2


def test_every_kind_of_layer_may_be_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo import config as dynamo

    monkeypatch.setattr(torch, "compile", lambda block, dynamic: block)
    overrides = {str(i): {"mlp.intermediate_size": 10 + i} for i in range(12)}
    with dynamo.patch(recompile_limit=8):  # pytest's own patching would leave the setting unreadable
        build(config(num_layers=12, overrides=overrides)).set_runtime(compile=True)
        assert dynamo.recompile_limit == 8 * 12


def test_autocast_decodes_in_its_own_dtype() -> None:
    model, ids = loud(build(dtype=torch.float32)), tokens()
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        state = model.init_state(2, 7)
        assert state.branches[0][0]["attention"].k_BKSH.dtype == torch.bfloat16
        logits, _ = model.decode(ids, state)
        assert logits.dtype == torch.float32
        torch.testing.assert_close(logits, model(ids), rtol=0.05, atol=0.2)


def test_vocabulary_may_be_larger_than_the_tokenizer_but_not_smaller() -> None:
    model = build(config(vocab_size=V + 5))
    assert model.vocab_size == V + 5
    assert model(tokens()).shape == (2, 7, V + 5)
    with pytest.raises(ConfigError, match=r"18 rows cannot hold the tokenizer's 19 ids"):
        build(config(vocab_size=V - 1))


def test_no_room_left_is_an_error() -> None:
    model = build()
    with pytest.raises(ConfigError, match="do not fit"):
        model.decode(tokens(), model.init_state(2, 6))
