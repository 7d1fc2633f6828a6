"""Arguments of the verbs that write text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from graft.generation.sampling import SamplingSettings
    from graft.training.load import LoadedRun

Run = Annotated[str, typer.Argument(help="Run directory (its newest valid checkpoint), or one checkpoint's folder.")]
Best = Annotated[bool, typer.Option("--best", help="Use the checkpoint with the lowest held-out loss.")]
Device = Annotated[str, typer.Option(help="auto | cpu | cuda | cuda:N | mps")]
Dtype = Annotated[str, typer.Option(help="Weights in fp32 or bf16; bf16 halves memory and is faster where supported.")]
MaxNewTokens = Annotated[int, typer.Option(help="Most tokens added.", min=1)]
Temperature = Annotated[
    float | None, typer.Option(help="0 = always the most likely token; default 0.8, with --top-k 50 if nothing is set.")
]
TopK = Annotated[int | None, typer.Option(help="Draw from the k most likely tokens.")]
TopP = Annotated[float | None, typer.Option(help="Draw from the smallest set with this probability.")]
MinP = Annotated[float | None, typer.Option(help="Draw from tokens this share as likely as the best one.")]
RepetitionPenalty = Annotated[float, typer.Option(help="Above 1: tokens seen before become less likely.")]
Seed = Annotated[int, typer.Option(help="Decides every draw.")]
Compile = Annotated[
    bool, typer.Option("--compile", help="torch.compile the steps after the prompt: pays off for long texts.")
]
MemoryBits = Annotated[int | None, typer.Option(help="Round the slots of memory banks to 8 or 4 bits.")]
MemoryGroupSize = Annotated[
    int | None, typer.Option(help="Channels of a slot that share a scale (default: all).", min=1)
]
Stop = Annotated[list[str] | None, typer.Option(help="End at this text; may be repeated.")]

DEFAULT_TEMPERATURE = 0.8
DEFAULT_TOP_K = 50


def settings(
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
    repetition_penalty: float,
    seed: int,
) -> SamplingSettings:
    """The sampling settings of a command line.

    Without any of temperature and the filters, text is drawn at a moderate temperature from the likelier tokens.
    """
    from graft.generation.sampling import SamplingSettings

    if temperature is None and top_k is None and top_p is None and min_p is None:
        top_k = DEFAULT_TOP_K
    return SamplingSettings(
        temperature=DEFAULT_TEMPERATURE if temperature is None else temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )


def checked_bits(bits: int | None, group_size: int | None) -> Literal[8, 4] | None:
    """What --memory-bits and --memory-group-size say together.

    Raises:
        ConfigError: bits that there are not, or a group size alone.
    """
    from graft.errors import ConfigError

    if bits is None and group_size is not None:
        raise ConfigError("it says how to round, and nothing is", where="--memory-group-size", fix="add --memory-bits")
    if bits not in (None, 8, 4):
        raise ConfigError(f"{bits} bits", where="--memory-bits", expected="8 or 4")
    return bits


def open_run(path: str, *, best: bool, device: str, dtype: str) -> LoadedRun:
    """The model that a command line names.

    Raises:
        ConfigError: the dtype's name means nothing.
        CheckpointError, DataError, ResourceError: as loading may.
    """
    import torch

    from graft.errors import ConfigError
    from graft.training.load import load_run
    from graft.training.runtime import resolve_device

    dtypes: dict[str, Any] = {"fp32": torch.float32, "bf16": torch.bfloat16}
    if dtype not in dtypes:
        raise ConfigError(f"'{dtype}' is no dtype", where="--dtype", expected=" or ".join(dtypes))
    which = "best" if best else "newest"
    return load_run(path, which=which, device=resolve_device(device, where="--device"), dtype=dtypes[dtype])


def leak_notice(run: LoadedRun) -> str | None:
    """What to say when a text is made by a model that read ahead while it was trained."""
    from graft.config.advice import LEAK

    return LEAK if run.experiment.model.leaks_future else None


def length_notice(run: LoadedRun, tokens: int) -> str | None:
    """What to say when a text gets longer than the model was trained on."""
    seq_len = run.experiment.data.seq_len
    if tokens <= seq_len:
        return None
    return f"up to {tokens} tokens, but the model was trained on {seq_len}: text beyond that may lose its thread"
