"""``graft generate``: text from a trained model."""

from __future__ import annotations

from typing import Annotated

import typer

from graft.cli import _sampling as arguments
from graft.cli._options import Json, console, print_json

app = typer.Typer(add_completion=False)


@app.command()
def generate(
    run: arguments.Run,
    prompt: Annotated[
        list[str] | None, typer.Option(help="Text to continue; may be repeated. Without one, a new document starts.")
    ] = None,
    max_new_tokens: arguments.MaxNewTokens = 200,
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
    compile: arguments.Compile = False,
    as_json: Json = False,
) -> None:
    """Continue prompts with a trained model.

    One prompt is shown as it is written; several are written as one batch and shown afterwards. A prompt starts a
    document, as in training; the text ends with the document, at --stop, or after --max-new-tokens.
    """
    from graft.generation.text import generate_text, prompt_ids

    settings = arguments.settings(temperature, top_k, top_p, min_p, repetition_penalty, seed)
    loaded = arguments.open_run(run, best=best, device=device, dtype=dtype)
    loaded.model.set_runtime(compile_decode=compile)
    prompts = [prompt_ids(loaded.tokenizer, text) for text in prompt or [""]]
    length = max(map(len, prompts)) + max_new_tokens
    for notice in filter(None, (arguments.leak_notice(loaded), arguments.length_notice(loaded, length))):
        console(stderr=True).print(f"note: {notice}")
    single = len(prompts) == 1 and not as_json
    if single:
        typer.echo((prompt or [""])[0], nl=False)
    results = generate_text(
        loaded.model,
        loaded.tokenizer,
        prompts,
        settings=settings,
        max_new_tokens=max_new_tokens,
        stop=stop or [],
        on_text=(lambda _, text: typer.echo(text, nl=False)) if single else None,
    )
    if as_json:
        texts = [
            {"prompt": text, "text": result.text, "tokens": len(result.token_ids), "finish": result.finish}
            for text, result in zip(prompt or [""], results, strict=True)
        ]
        print_json({"checkpoint": str(loaded.checkpoint), "step": loaded.step, "generations": texts})
    elif single:
        typer.echo()
    else:
        for text, result in zip(prompt or [""], results, strict=True):
            typer.echo(f"--- {result.finish} ---\n{text}{result.text}")
