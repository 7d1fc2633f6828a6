"""Contracts about numbers and training: denominators, precision, gradients, determinism, round trips."""

from __future__ import annotations

import torch
from safetensors.torch import load, save
from torch import Tensor

from graft.contracts.subject import ContractBroken, Subject, assert_close
from graft.data.batch import IGNORED_TARGET, Batch
from graft.initialization import generator_for, initialize
from graft.model import Model, build_model
from graft.objectives.base import plain_cross_entropy


def _batch(subject: Subject, rows: slice = slice(None)) -> Batch:
    """Four packed rows with some ignored targets, or some of them."""
    ids = subject.tokens(4)[rows]
    targets = subject.tokens(4, salt="targets")
    ignored = torch.rand(targets.shape, generator=generator_for(subject.seed, "ignored")) < 0.3
    targets = targets.masked_fill(ignored, IGNORED_TARGET)[rows]
    cut = subject.seq_len // 2
    segments = torch.cat([torch.full((4, cut), 1), torch.full((4, subject.seq_len - cut), 2)], 1)[rows]
    count = int((targets != IGNORED_TARGET).sum())
    return Batch(ids, targets, segments, None, count, count, tuple(range(len(ids))))


def _loss_terms(subject: Subject, model: Model, batch: Batch) -> tuple[Tensor, Tensor]:
    """Sums over targets and over positions: the objective's, or (an encoder under a causal one) plain cross-entropy."""
    refused = subject.config.bidirectional and not subject.objective.supports_bidirectional
    terms = plain_cross_entropy(model, batch) if refused else subject.objective.build().loss(model, batch)
    return terms.main, terms.aux


def _backward(subject: Subject, model: Model, batches: list[Batch]) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of one step over micro-batches, with the denominators of the whole step."""
    num_targets = sum(b.num_targets for b in batches)
    num_positions = sum(b.num_positions for b in batches)
    model.zero_grad(set_to_none=True)
    torch.manual_seed(subject.seed)  # dropout, if the model is training
    total = torch.zeros((), dtype=torch.float64)
    for batch in batches:
        main, aux = _loss_terms(subject, model, batch)
        loss = main / num_targets + aux / num_positions
        loss.backward()
        total += loss.detach()
    return total, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def _same_step(actual: tuple[Tensor, dict[str, Tensor]], expected: tuple[Tensor, dict[str, Tensor]], what: str) -> None:
    assert_close(actual[0], expected[0], f"{what}: loss")
    if actual[1].keys() != expected[1].keys():
        raise ContractBroken(f"{what}: gradients of {sorted(actual[1].keys() ^ expected[1].keys())} on one side only")
    for name, grad in expected[1].items():
        assert_close(actual[1][name], grad, f"{what}: gradient of {name}", 1e-7)


def micro_batches_add_up(subject: Subject) -> None:
    """One micro-batch of four rows trains as four of one, however unevenly targets are spread."""
    whole = _backward(subject, subject.model, [_batch(subject)])
    parts = [_batch(subject, slice(i, i + 1)) for i in range(4)]
    _same_step(_backward(subject, subject.model, parts), whole, "4 micro-batches against 1")


def every_parameter_learns(subject: Subject) -> None:
    """Every parameter gets a gradient that is finite and not all zero."""
    _, grads = _backward(subject, subject.model, [_batch(subject)])
    for name, parameter in subject.model.named_parameters():
        if name not in grads:
            raise ContractBroken(f"{name} gets no gradient")
        if not torch.isfinite(grads[name]).all():
            raise ContractBroken(f"the gradient of {name} is not finite")
        if parameter.numel() > 1 and not grads[name].any():
            raise ContractBroken(f"the gradient of {name} is all zero")


def checkpointing_changes_nothing(subject: Subject) -> None:
    """Recomputing each block in the backward pass gives the same loss and gradients."""
    plain = _backward(subject, subject.build().train(), [_batch(subject)])
    recomputed = subject.build().train()
    recomputed.set_runtime(activation_checkpointing="block")
    _same_step(_backward(subject, recomputed, [_batch(subject)]), plain, "activation checkpointing")


def kernels_agree(subject: Subject) -> None:
    """The fast form of every operation equals its plain reference, in loss and gradients."""
    fast = _backward(subject, subject.build(), [_batch(subject)])
    reference = subject.build()
    reference.set_runtime(kernels="reference")
    _same_step(fast, _backward(subject, reference, [_batch(subject)]), "fast kernels against the reference")


def compiled_equals_eager(subject: Subject) -> None:
    """torch.compile per block gives the same loss and gradients."""
    compiled = subject.build()
    compiled.set_runtime(compile=True)
    eager = _backward(subject, subject.model, [_batch(subject)])
    _same_step(_backward(subject, compiled, [_batch(subject)]), eager, "compiled against eager")


def finite_in_bf16(subject: Subject) -> None:
    """Under bf16 autocast loss and gradients are finite and the loss is near that of fp32."""
    model = subject.build(dtype=torch.float32)
    exact, _ = _backward(subject, model, [_batch(subject)])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded, grads = _backward(subject, model, [_batch(subject)])
    bad = [name for name, grad in grads.items() if not torch.isfinite(grad).all()]
    if bad or not torch.isfinite(rounded):
        raise ContractBroken(f"not finite in bf16: {bad or 'the loss'}")
    assert_close(rounded, exact, "loss in bf16 against fp32", 0.1)


@torch.no_grad()
def same_seed_same_numbers(subject: Subject) -> None:
    """A seed decides every parameter; another seed gives others."""
    first, second = (_states(subject, subject.seed) for _ in range(2))
    other = _states(subject, subject.seed + 1)
    for name, tensor in first.items():
        if not torch.equal(tensor, second[name]):
            raise ContractBroken(f"{name} differs between two builds with one seed")
    random = [n for n, t in first.items() if t.numel() > 1 and t.float().std() > 0]
    if random and all(torch.equal(first[n], other[n]) for n in random):
        raise ContractBroken("another seed gives the same parameters")


@torch.no_grad()
def every_tensor_is_started(subject: Subject) -> None:
    """Every parameter and buffer is filled at the start, whatever the memory held before."""
    size = subject.config.vocab_size or subject.vocab_size
    started: list[dict[str, Tensor]] = []
    for held in (0, 1):
        model = build_model(subject.config, size, seed=subject.seed, device="meta").to_empty(device="cpu")
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        for tensor in tensors.values():
            tensor.fill_(held)
        initialize(model, subject.seed)
        started.append(tensors)
    for name, tensor in started[0].items():
        if not torch.equal(tensor, started[1][name]):
            raise ContractBroken(f"{name} is not filled: init_parameters of the module that owns it leaves it out")


def _states(subject: Subject, seed: int) -> dict[str, Tensor]:
    size = subject.config.vocab_size or subject.vocab_size
    return dict(build_model(subject.config, size, seed=seed, device="cpu").state_dict())


@torch.no_grad()
def state_dict_round_trip(subject: Subject) -> None:
    """Weights saved and loaded into a model from another seed give the same logits."""
    saved = {name: p.contiguous() for name, p in subject.model.named_parameters()}  # named once when tied
    loaded = load(save(saved))
    other = subject.build()
    for parameter in other.parameters():
        parameter.zero_()
    missing = other.load_state_dict(loaded, strict=False)
    if missing.unexpected_keys:
        raise ContractBroken(f"unexpected weights {missing.unexpected_keys}")
    ids = subject.tokens(2)
    assert_close(other(ids), subject.model(ids), "logits after saving and loading", 0.0)


def config_round_trip(subject: Subject) -> None:
    """The config written out and read back is equal."""
    again = type(subject.config).model_validate(subject.config.to_dict())
    if again != subject.config:
        raise ContractBroken("the config differs after writing and reading")


def counted_equals_built(subject: Subject) -> None:
    """The meta-device build has the parameters of the real one, and active ones are no more than all."""
    size = subject.config.vocab_size or subject.vocab_size
    meta = build_model(subject.config, size, seed=0, device="meta")
    counts = [{n: tuple(p.shape) for n, p in m.named_parameters()} for m in (meta, subject.model)]
    if counts[0] != counts[1]:
        raise ContractBroken("parameters differ between the meta device and the real one")
