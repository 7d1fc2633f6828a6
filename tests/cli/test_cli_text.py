"""generate, chat and eval on a real run directory."""

import functools
import io
import json
import math
from pathlib import Path

import pytest
import torch

from graft import api
from graft.cli.main import run
from graft.errors import CheckpointError, ConfigError, ExitCode
from graft.evals.documents import stored_documents
from graft.evals.perplexity import text_loss
from graft.generation.chat import Conversation
from graft.generation.engine import generate
from graft.generation.sampling import SamplingSettings
from graft.generation.text import generate_text
from graft.training.checkpoint import CheckpointStore
from graft.training.load import LoadedRun, find_checkpoint, load_run
from tiny_run import tiny

GREEDY = SamplingSettings(temperature=0.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of twelve steps with three checkpoints."""
    place = tmp_path_factory.mktemp("text")
    out = place / "run"
    trained = api.train(tiny(place), out=out, stream=io.StringIO())
    torch.save({n: p.detach() for n, p in trained.model.named_parameters()}, place / "weights.pt")
    return out


@pytest.fixture(scope="module")
def loaded(folder: Path) -> LoadedRun:
    return load_run(folder)


def output(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    assert run(list(arguments)) == code
    return capsys.readouterr().out


def test_a_run_is_read_back_as_it_was(folder: Path, loaded: LoadedRun) -> None:
    weights = torch.load(folder.parent / "weights.pt")
    assert loaded.step == 12
    for name, parameter in loaded.model.named_parameters():
        assert torch.equal(parameter, weights[name])
    assert loaded.tokenizer.vocab_size == 257
    assert load_run(loaded.checkpoint).checkpoint == loaded.checkpoint
    earlier = load_run(folder / "checkpoints" / "step-00000004")
    assert earlier.step == 4
    assert not torch.equal(earlier.model.head_weight(), loaded.model.head_weight())
    half = load_run(folder, dtype=torch.bfloat16)
    assert all(p.dtype == torch.bfloat16 for p in half.model.parameters())


def test_the_best_checkpoint_has_the_lowest_loss(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "checkpoints", keep_last=5)
    for step, score in ((1, 3.0), (2, 1.0), (3, 2.0)):
        store.save(step, {"model": {"w": torch.zeros(1)}}, {}, {}, score=score)
    assert find_checkpoint(tmp_path, "best").name == "step-00000002"
    assert find_checkpoint(tmp_path, "newest").name == "step-00000003"
    # a damaged one is passed over, and left for its run to deal with
    damaged = tmp_path / "checkpoints" / "step-00000003"
    (damaged / "model.safetensors").write_bytes(b"")
    assert find_checkpoint(tmp_path, "newest").name == "step-00000002"
    assert damaged.is_dir()


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nothing here"):
        load_run(tmp_path / "missing")
    with pytest.raises(CheckpointError, match="neither a run directory nor a checkpoint"):
        load_run(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(CheckpointError, match="no valid checkpoint"):
        load_run(tmp_path)


def test_generate_json(folder: Path, loaded: LoadedRun, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["generate", str(folder), "--temperature", "0", "--max-new-tokens", "9", "--json", "--device", "cpu"]
    data = json.loads(output(capsys, *command, "--prompt", "the cat", "--prompt", ""))
    expected = generate_text(loaded.model, loaded.tokenizer, ["the cat", ""], settings=GREEDY, max_new_tokens=9)
    assert [g["text"] for g in data["generations"]] == [g.text for g in expected]
    assert [g["finish"] for g in data["generations"]] == [g.finish for g in expected]
    assert data["step"] == 12


def test_generate_compiled_writes_the_same_text(
    folder: Path, capsys: pytest.CaptureFixture[str], compiling: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._dynamo.utils import counters

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))  # traces alone
    command = ["generate", str(folder), "--temperature", "0", "--max-new-tokens", "9", "--device", "cpu"]
    plain = output(capsys, *command)
    counters.clear()
    assert output(capsys, *command, "--compile") == plain
    assert counters["stats"]["unique_graphs"] > 0, "nothing was compiled"


def test_generate_streams_one_prompt_and_lists_several(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["generate", str(folder), "--seed", "3", "--max-new-tokens", "9", "--device", "cpu", "--prompt", "a dog"]
    one = output(capsys, *command)
    (text,) = json.loads(output(capsys, *command, "--json"))["generations"]
    assert one == "a dog" + text["text"] + "\n"
    several = output(capsys, *command, "--prompt", "red")
    assert one.rstrip("\n") in several, "the batch around a prompt changes nothing"
    assert output(capsys, *command[:3], "4", *command[4:]) != one


def test_generate_says_what_is_wrong(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output(capsys, "generate", str(folder.parent / "no"), code=ExitCode.CHECKPOINT)
    output(capsys, "generate", str(folder), "--temperature", "0", "--top-k", "3", code=ExitCode.CONFIG)
    output(capsys, "generate", str(folder), "--dtype", "int8", code=ExitCode.CONFIG)
    assert run(["generate", str(folder), "--prompt", "a", "--max-new-tokens", "0"]) == ExitCode.CONFIG
    assert capsys.readouterr().out == "", "not even the prompt is written"


def test_generate_notes_texts_longer_than_trained(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["generate", str(folder), "--max-new-tokens", "40", "--device", "cpu"]) == 0
    assert "trained on 32" in capsys.readouterr().err


def test_eval_of_a_file(folder: Path, loaded: LoadedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "one.txt"
    file.write_text("the red cat sees the öld dog")
    data = json.loads(output(capsys, "eval", str(folder), "--text", str(file), "--json", "--device", "cpu"))
    assert (data["bytes"], data["characters"], data["tokens"]) == (29, 28, 30)
    assert (data["context"], data["stride"]) == (32, 16)
    ids = torch.tensor([[256, *file.read_bytes(), 256]])
    logits = loaded.model(ids[:, :-1])[0]
    total = float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
    assert data["loss"] == pytest.approx(total / 30, rel=1e-5)
    assert data["bits_per_byte"] == pytest.approx(total / math.log(2) / 29, rel=1e-5)
    assert "bits_per_byte" in output(capsys, "eval", str(folder), "--text", str(file), "--device", "cpu")


def test_eval_of_the_held_out_documents(folder: Path, loaded: LoadedRun, capsys: pytest.CaptureFixture[str]) -> None:
    from graft.data.prepare import prepare

    command = ["eval", str(folder), "--validation", "--context", "16", "--stride", "4", "--json", "--device", "cpu"]
    data = json.loads(output(capsys, *command))
    prepared = prepare(loaded.experiment)
    assert data["documents"] == prepared.validation.num_documents
    assert data["tokens"] == prepared.validation.num_tokens
    assert data["bytes"] == prepared.validation.num_tokens - prepared.validation.num_documents
    result = text_loss(
        loaded.model,
        loaded.experiment.objective.build(),
        stored_documents(prepared.validation, loaded.tokenizer),
        end_of_document=256,
        context=16,
        stride=4,
        batch_size=1,
    )
    assert data["loss"] == pytest.approx(result.loss, rel=1e-5)


def test_eval_says_what_is_wrong(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = tmp_path / "bad.txt"
    bad.write_bytes(b"ab\xff")
    output(capsys, "eval", str(folder), code=ExitCode.CONFIG)
    output(capsys, "eval", str(folder), "--validation", "--text", str(bad), code=ExitCode.CONFIG)
    output(capsys, "eval", str(folder), "--text", str(bad), code=ExitCode.DATA)
    assert run(["eval", str(folder), "--text", str(tmp_path / "none.txt")]) == ExitCode.DATA
    assert "none.txt" in capsys.readouterr().err


def conversation(loaded: LoadedRun, context: int = 32) -> Conversation:
    return Conversation(loaded.model, loaded.tokenizer, settings=GREEDY, max_new_tokens=6, context=context)


def test_a_conversation_is_one_document(loaded: LoadedRun) -> None:
    talk = conversation(loaded)
    shown: list[str] = []
    first = talk.say("the", shown.append)
    second = talk.say(" cat", shown.append)
    assert "".join(shown) == first + second
    for text, answer in (("the", first), (f"the{first} cat", second)):
        (expected,) = generate_text(loaded.model, loaded.tokenizer, [text], settings=GREEDY, max_new_tokens=6)
        assert answer == expected.text
    talk.reset()
    assert talk.say("the", shown.append) == first


def test_a_conversation_forgets_its_oldest_tokens(loaded: LoadedRun) -> None:
    talk = conversation(loaded, context=12)
    answer = talk.say("abcdefghijklmnop", lambda text: None)
    # room for six tokens before the answer, one of them the end-of-document id
    (expected,) = generate_text(loaded.model, loaded.tokenizer, ["lmnop"], settings=GREEDY, max_new_tokens=6)
    assert answer == expected.text
    with pytest.raises(ConfigError, match="no room"):
        conversation(loaded, context=7)


def test_chat(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    lines = iter(["the", "/reset", "the", "/what", "/quit", "never read"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    assert run(["chat", str(folder), "--temperature", "0", "--max-new-tokens", "6", "--device", "cpu"]) == 0
    out, err = capsys.readouterr()
    first, second = out.splitlines()[: len(out.splitlines()) // 2], out.splitlines()[len(out.splitlines()) // 2 :]
    assert first == second, "after /reset the same words start the same document"
    assert "base model" in err
    assert err.count("/quit") == 2, "shown at the start and for an unknown command"
    assert next(lines) == "never read"


def test_the_api_continues_text_and_ids(loaded: LoadedRun) -> None:
    (text,) = api.generate(loaded.model, ["the"], tokenizer=loaded.tokenizer, settings=GREEDY, max_new_tokens=5)
    (ids,) = api.generate(loaded.model, [[256, *b"the"]], settings=GREEDY, max_new_tokens=5)
    assert text.text == loaded.tokenizer.decode(list(text.token_ids))
    assert ids == generate(loaded.model, [[256, *b"the"]], settings=GREEDY, max_new_tokens=5)[0]
    with pytest.raises(ConfigError, match="needs a tokenizer"):
        api.generate(loaded.model, ["the"])
