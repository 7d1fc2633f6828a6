"""The price of a config before it runs: parameters, FLOPs, memory, decode state. Nothing is allocated."""

from __future__ import annotations

import torch

from graft.config.experiment import Experiment
from graft.cost.counts import (
    embedding_state_bytes,
    idle_shared_parameters,
    parameters_by_part,
    parameters_by_role,
    part_costs,
)
from graft.cost.memory import MemoryBytes, training_memory
from graft.cost.report import CostReport, FlopsPerToken, Parameters, human_bytes
from graft.errors import ConfigError
from graft.model import Model
from graft.training.memory import smaller_micro_batch
from graft.training.runtime import memory_limit_bytes
from graft.training.throughput import ends_flops_per_token, forward_flops_per_token

_TIGHT = 0.9
"""Share of the machine's memory above which a warning is due: the interpreter and other programs need room too."""


def known_vocab_size(experiment: Experiment) -> int:
    """The model's vocabulary as far as the config tells.

    Raises:
        ConfigError: only the training text can tell (a tokenizer made from it).
    """
    if experiment.model.vocab_size is not None:
        return experiment.model.vocab_size
    promised = getattr(experiment.data.tokenizer, "vocab_size", None)  # bpe: ids it is trained to have
    if promised is not None:
        return promised
    size = getattr(experiment.data.tokenizer.build(), "vocab_size", None)
    if size is None:
        raise ConfigError(
            f"the vocabulary of a '{experiment.data.tokenizer.tag}' tokenizer is known only once it has seen the "
            "training text",
            where="model.vocab_size",
            fix="set model.vocab_size to the number of ids that `graft data build` prints for this config",
        )
    return size


def _memory_warnings(experiment: Experiment, memory: MemoryBytes, limit: int | None) -> list[str]:
    if limit is None or memory.total <= _TIGHT * limit:
        return []
    need, have = human_bytes(memory.total), human_bytes(limit)
    verdict = "does not fit" if memory.total > limit else "barely fits"
    smaller = smaller_micro_batch(experiment)
    steps = [] if smaller is None else [f"training.micro_batch_size={smaller}"]
    if experiment.runtime.activation_checkpointing == "none":
        steps.append("runtime.activation_checkpointing=block")
    advice = f"; try {' or '.join(steps)}" if steps else "; make the model smaller"
    return [f"training {verdict}: {need} predicted, {have} available{advice}"]


def price(experiment: Experiment, vocab_size: int | None = None) -> CostReport:
    """What training ``experiment`` costs, without allocating it.

    Args:
        experiment: the whole config.
        vocab_size: the tokenizer's size, where the config does not tell (`known_vocab_size`).

    Raises:
        ConfigError: the vocabulary's size is not known.
    """
    vocab_size = experiment.model.vocab_size or vocab_size or known_vocab_size(experiment)
    seq_len = experiment.data.seq_len
    with torch.device("meta"):
        model = Model(experiment.model, vocab_size)
    state_dtype = torch.float32 if experiment.precision == "fp32" else torch.bfloat16
    parts = part_costs(model, seq_len, state_dtype)
    total = sum(p.numel() for p in model.parameters())
    forward = forward_flops_per_token(model, seq_len)
    checkpointed = experiment.runtime.activation_checkpointing == "block"
    tokens = experiment.max_steps * experiment.tokens_per_step
    memory = training_memory(experiment, vocab_size)
    limit = memory_limit_bytes()
    state_bytes = embedding_state_bytes(model, state_dtype) + sum(part.state_bytes for part in parts)
    return CostReport(
        name=experiment.name,
        vocab_size=vocab_size,
        seq_len=seq_len,
        micro_batch_size=experiment.micro_batch_size,
        precision=experiment.precision,
        parameters=Parameters(
            total=total,
            active=total
            - sum(part.parameters - part.active_parameters for part in parts)
            - idle_shared_parameters(model),
            per_part=parameters_by_part(model),
            per_role=parameters_by_role(model),
        ),
        flops_per_token=FlopsPerToken(
            forward=forward,
            backward=2 * forward,
            recomputed=forward - ends_flops_per_token(model) if checkpointed else 0.0,
        ),
        memory_bytes=memory,
        state_bytes_per_token=state_bytes / seq_len,
        state_bytes=state_bytes,
        parts=tuple(parts),
        steps=experiment.max_steps,
        tokens_per_step=experiment.tokens_per_step,
        tokens=tokens,
        training_flops=tokens * 3 * forward,
        memory_limit_bytes=limit,
        warnings=tuple(_memory_warnings(experiment, memory, limit)),
    )
