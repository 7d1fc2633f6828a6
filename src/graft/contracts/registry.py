"""All contracts by name, and running them on a config."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from graft.contracts import sequence, training
from graft.contracts.subject import ContractBroken, Subject

Contract = Callable[[Subject], None]

CAUSAL: tuple[Contract, ...] = (
    sequence.never_looks_ahead,
    sequence.looks_back,
    sequence.decoding_equals_forward,
    sequence.batched_decoding_equals_single,
    sequence.state_is_as_counted,
)
"""Hold for decoders."""

BIDIRECTIONAL: tuple[Contract, ...] = (sequence.looks_both_ways,)
"""Hold for encoders."""

ALWAYS: tuple[Contract, ...] = (
    sequence.documents_do_not_meet,
    sequence.padding_does_not_matter,
    training.micro_batches_add_up,
    training.every_parameter_learns,
    training.checkpointing_changes_nothing,
    training.kernels_agree,
    training.finite_in_bf16,
    training.same_seed_same_numbers,
    training.every_tensor_is_started,
    training.state_dict_round_trip,
    training.config_round_trip,
    training.counted_equals_built,
)
"""Hold for every model."""

SLOW: tuple[Contract, ...] = (training.compiled_equals_eager,)
"""Hold for every model, and need a C++ compiler and tens of seconds."""


def contracts_for(subject: Subject, *, slow: bool = False) -> tuple[Contract, ...]:
    """The contracts that apply to a subject."""
    direction = BIDIRECTIONAL if subject.config.bidirectional else CAUSAL
    return (*direction, *ALWAYS, *(SLOW if slow else ()))


@dataclass(frozen=True)
class Verdict:
    """How one contract ended: ``problem`` is None when it holds."""

    contract: str
    claim: str
    problem: str | None


def examine(subject: Subject, *, slow: bool = False) -> list[Verdict]:
    """Runs every contract that applies; a broken one does not stop the others."""
    verdicts = []
    for contract in contracts_for(subject, slow=slow):
        try:
            contract(subject)
            problem = None
        except ContractBroken as broken:
            problem = str(broken)
        claim = (contract.__doc__ or "").strip().splitlines()[0]
        verdicts.append(Verdict(contract.__name__, claim, problem))
    return verdicts
