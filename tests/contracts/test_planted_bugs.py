"""Every contract must fail on a bug of the kind it exists for. A contract that passes here is no contract."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import graft.channel_mixers.mlp as mlp_module
import graft.token_mixers.attention as attention_module
import graft.token_mixers.heads as heads_module
from graft.config.model import ModelConfig
from graft.contracts import sequence, training
from graft.contracts.subject import ContractBroken, Subject
from graft.initialization import generator_for
from graft.model import Model
from graft.norms.rms_norm import RMSNorm
from graft.objectives.causal_lm import CausalLM
from graft.objectives.causal_lm_config import CausalLMConfig
from graft.ops.attention_mask import Scoring, Visibility
from graft.part import PartOutput

Contract = Callable[[Subject], None]


def subject(**attention: Any) -> Subject:
    mixer = {"type": "attention", "num_heads": 2, "position": {"type": "rope"}, **attention}
    config = ModelConfig.model_validate(
        {
            "hidden_size": 8,
            "num_layers": 2,
            "norm": {"type": "rms_norm"},
            "blocks": {"b": [mixer, {"type": "mlp", "intermediate_size": 12}]},
        }
    )
    return Subject(config, CausalLMConfig())


def broken(contract: Contract, examined: Subject) -> str:
    """The contract's complaint; fails when it has none."""
    with pytest.raises(ContractBroken) as caught:
        contract(examined)
    return str(caught.value)


def test_they_hold_without_a_bug() -> None:
    for contract in (*_all_of(sequence), *_all_of(training)):
        if contract not in (sequence.looks_both_ways, training.compiled_equals_eager):
            contract(subject())
            contract(subject(sliding_window=4))


def _all_of(module: Any) -> list[Contract]:
    return [f for n, f in vars(module).items() if callable(f) and f.__module__ == module.__name__ and n[0] != "_"]


def change_mask(monkeypatch: pytest.MonkeyPatch, **wrong: Any) -> None:
    """Every mask is made as if ``wrong`` were so."""
    original = Visibility.__init__

    def planted(self: Visibility, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        for name, value in wrong.items():
            object.__setattr__(self, name, value(getattr(self, name)))

    monkeypatch.setattr(Visibility, "__init__", planted)


def test_mask_off_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    change_mask(monkeypatch, offset=lambda offset: offset + 1)
    assert "comes later" in broken(sequence.never_looks_ahead, subject())


def test_mask_without_causality(monkeypatch: pytest.MonkeyPatch) -> None:
    change_mask(monkeypatch, causal=lambda _: False)
    broken(sequence.never_looks_ahead, subject())


def test_mixer_that_sees_only_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    change_mask(monkeypatch, window=lambda _: 1)
    assert "before it" in broken(sequence.looks_back, subject())


def test_encoder_that_is_causal(monkeypatch: pytest.MonkeyPatch) -> None:
    change_mask(monkeypatch, causal=lambda _: True)
    shown = subject()
    encoder = Subject(shown.config.replace(bidirectional=True), shown.objective)
    assert "after it" in broken(sequence.looks_both_ways, encoder)


def test_documents_that_see_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    change_mask(monkeypatch, query_segments_BT=lambda _: None, key_segments_BS=lambda _: None)
    assert "document 2" in broken(sequence.documents_do_not_meet, subject())
    assert "left" in broken(sequence.padding_does_not_matter, subject())


def test_positions_that_do_not_restart(monkeypatch: pytest.MonkeyPatch) -> None:
    """With learned positions a second document must start from 0 again (relative positions would not care)."""
    shown = subject(position={"type": "none"})
    learned = {"position": {"type": "learned", "max_seq_len": 40}}
    config = shown.config.replace(embedding=learned)
    sequence.documents_do_not_meet(Subject(config, shown.objective))

    def running(segment_ids_BT: Tensor, *_: Tensor) -> Tensor:
        return torch.arange(segment_ids_BT.shape[1]).expand(segment_ids_BT.shape)

    monkeypatch.setattr("graft.network.sequence.positions_in_segments", running)
    assert "document 2" in broken(sequence.documents_do_not_meet, Subject(config, shown.objective))


def test_cache_that_forgets_its_oldest_key(monkeypatch: pytest.MonkeyPatch) -> None:
    original = heads_module.extend

    def forgetful(*args: Any, **kwargs: Any) -> Any:
        keys, state = original(*args, **kwargs)
        if keys.k_BSKH.shape[1] > 4:
            keys = keys._replace(k_BSKH=keys.k_BSKH[:, 1:], v_BSKH=keys.v_BSKH[:, 1:], offset=keys.offset - 1)
        return keys, state

    monkeypatch.setattr(heads_module, "extend", forgetful)
    assert "token by token" in broken(sequence.decoding_equals_forward, subject())


def test_decoding_that_ignores_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Model.decode

    def deaf(self: Model, ids: Tensor, state: Any, **kwargs: Any) -> Any:
        kwargs.pop("segment_ids_BS", None)
        return original(self, ids, state, **kwargs)

    monkeypatch.setattr(Model, "decode", deaf)
    assert "shorter prompt" in broken(sequence.batched_decoding_equals_single, subject())


def test_state_that_init_state_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    original = mlp_module.Mlp.forward

    def keeping(self: Any, x_BTD: Tensor, ctx: Any, state: Any = None) -> PartOutput:
        return original(self, x_BTD, ctx)._replace(state=x_BTD[:, -1])

    monkeypatch.setattr(mlp_module.Mlp, "forward", keeping)
    assert "says 0" in broken(sequence.state_is_as_counted, subject())


def test_mean_of_means(monkeypatch: pytest.MonkeyPatch) -> None:
    original = CausalLM.loss

    def mean(self: CausalLM, model: Model, batch: Any) -> Any:
        terms = original(self, model, batch)
        return replace(terms, main=terms.main / batch.num_targets)

    monkeypatch.setattr(CausalLM, "loss", mean)
    assert "micro-batches" in broken(training.micro_batches_add_up, subject())


def test_parameter_that_is_never_used(monkeypatch: pytest.MonkeyPatch) -> None:
    original = attention_module.Attention.forward

    def detached(self: Any, x_BTD: Tensor, ctx: Any, state: Any = None) -> PartOutput:
        out = original(self, x_BTD, ctx, state)
        return out._replace(y=out.y.detach())

    monkeypatch.setattr(attention_module.Attention, "forward", detached)
    assert "gradient" in broken(training.every_parameter_learns, subject())


def test_overflow_in_low_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    original = attention_module.Attention.forward

    def overflow(self: Any, x_BTD: Tensor, ctx: Any, state: Any = None) -> PartOutput:
        out = original(self, x_BTD, ctx, state)
        return out._replace(y=out.y * 1e38 * 1e38 / 1e38 / 1e38 if out.y.dtype == torch.bfloat16 else out.y)

    monkeypatch.setattr(attention_module.Attention, "forward", overflow)
    assert "bf16" in broken(training.finite_in_bf16, subject())


def test_start_that_ignores_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graft.initialization.generator_for", lambda seed, name: generator_for(0, name))
    assert "another seed" in broken(training.same_seed_same_numbers, subject())


def test_start_that_is_not_repeatable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graft.initialization.generator_for", lambda *_: torch.Generator().manual_seed(_fresh()))
    assert "one seed" in broken(training.same_seed_same_numbers, subject())


def _fresh(counter: list[int] = [0]) -> int:  # noqa: B006 - counts calls
    counter[0] += 1
    return counter[0]


def test_start_that_leaves_a_tensor_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RMSNorm, "init_parameters", lambda self, rng: None)
    assert "weight is not filled" in broken(training.every_tensor_is_started, subject())


def test_state_outside_the_state_dict(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Model.logits
    scales: dict[int, float] = {}

    def scaled(self: Model, x_BTD: Tensor) -> Tensor:
        return original(self, x_BTD) * scales.setdefault(id(self), 1.0 + len(scales))

    monkeypatch.setattr(Model, "logits", scaled)
    assert "loading" in broken(training.state_dict_round_trip, subject())


def test_config_that_forgets_a_field(monkeypatch: pytest.MonkeyPatch) -> None:
    original = ModelConfig.to_dict
    monkeypatch.setattr(ModelConfig, "to_dict", lambda self: {**original(self), "residual_scale": 0.5})
    assert "config differs" in broken(training.config_round_trip, subject())


def test_fast_kernel_with_a_wrong_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the fast path is changed, so only the comparison with the reference can see it."""
    import graft.ops.attention as dispatch

    original = dispatch.attention

    def planted(*args: Any, **kwargs: Any) -> Tensor:
        if kwargs.get("kernels") != "reference":
            args = tuple(replace(a, scale=a.scale * 1.01) if isinstance(a, Scoring) else a for a in args)
        return original(*args, **kwargs)

    monkeypatch.setattr(attention_module, "attention", planted)
    assert "reference" in broken(training.kernels_agree, subject())


def test_recomputation_with_other_dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint that does not restore the random state recomputes another dropout mask."""
    import functools

    import graft.model as model_module

    monkeypatch.setattr(
        model_module, "checkpoint", functools.partial(model_module.checkpoint, preserve_rng_state=False)
    )
    shown = subject()
    parts = [{**p.to_dict(), "residual_dropout": 0.5} for p in shown.config.blocks["b"]]
    config = shown.config.replace(blocks={"b": parts})
    broken(training.checkpointing_changes_nothing, Subject(config, shown.objective))


def test_meta_build_with_other_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    original = training.build_model

    def wrong(config: ModelConfig, size: int, **kwargs: Any) -> Model:
        return original(config, size + (kwargs["device"] == "meta"), **kwargs)

    monkeypatch.setattr(training, "build_model", wrong)
    assert "meta device" in broken(training.counted_equals_built, subject())
