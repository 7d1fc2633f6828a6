"""``graft chat``: write with a trained model in turns."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from graft.cli import _sampling as arguments
from graft.cli._options import console

if TYPE_CHECKING:
    from graft.generation.chat import Conversation

app = typer.Typer(add_completion=False)

HELP = "/reset forgets everything, /quit (or the end of input) leaves"


@app.command()
def chat(
    run: arguments.Run,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(help="Most tokens of one answer (default: half the training length, at most 200).", min=1),
    ] = None,
    temperature: arguments.Temperature = None,
    top_k: arguments.TopK = None,
    top_p: arguments.TopP = None,
    min_p: arguments.MinP = None,
    repetition_penalty: arguments.RepetitionPenalty = 1.0,
    seed: arguments.Seed = 0,
    stop: arguments.Stop = None,
    best: arguments.Best = False,
    device: arguments.Device = "auto",
    dtype: arguments.Dtype = "fp32",
) -> None:
    """Write with a trained model in turns: your line, then its continuation.

    A model trained on plain text continues it; it does not answer questions. Its text and yours form one document.
    """
    from graft.generation.chat import Conversation

    settings = arguments.settings(temperature, top_k, top_p, min_p, repetition_penalty, seed)
    loaded = arguments.open_run(run, best=best, device=device, dtype=dtype)
    seq_len = loaded.experiment.data.seq_len
    conversation = Conversation(
        loaded.model,
        loaded.tokenizer,
        settings=settings,
        max_new_tokens=min(200, seq_len // 2) if max_new_tokens is None else max_new_tokens,
        context=seq_len,
        stop=stop or [],
    )
    notes = console(stderr=True)
    if notice := arguments.leak_notice(loaded):
        notes.print(f"note: {notice}")
    notes.print(f"{loaded.checkpoint}: a base model; it continues your text and answers nothing. {HELP}.")
    _converse(conversation)


def _converse(conversation: Conversation) -> None:
    """Reads lines until the person leaves."""
    from graft.errors import DataError

    notes = console(stderr=True)
    while True:
        try:
            line = input("> ")
        except EOFError:
            return
        if line == "/quit":
            return
        if line == "/reset":
            conversation.reset()
            notes.print("(new document)")
        elif line.startswith("/"):
            notes.print(HELP)
        else:
            try:
                conversation.say(line, lambda text: typer.echo(text, nl=False))
            except DataError as error:  # a character the tokenizer does not know: say so and go on
                notes.print(f"error: {error}")
            typer.echo()
