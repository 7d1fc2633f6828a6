"""A built or trained model in a person's own program: an ordinary `torch.nn.Module`."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import graft
from graft.errors import ConfigError
from graft.model import Model
from tiny_run import tiny

PEER = "model.blocks.main.1={type: peer, product_key_dims: [4, 4], num_experts_per_tok: 2, num_heads: 2, query_dim: 8}"
ROWS = "optimizer.groups.expert_table={update: rowwise_adagrad}"
QUIET = ["model.blocks.main.0.dropout=0.0"]


@pytest.fixture
def model(tmp_path: Path) -> Model:
    return graft.build(tiny(tmp_path, *QUIET, PEER))


def ids(rows: int = 2, length: int = 9) -> Tensor:
    return torch.randint(257, (rows, length), generator=torch.Generator().manual_seed(0))


def losses_by_hand(model: Model, steps: int = 12) -> list[float]:
    """A training loop as anybody writes it."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses: list[float] = []
    for _ in range(steps):
        logits = model(ids()[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), ids()[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.layout == torch.strided for p in model.parameters())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_a_loop_by_hand_learns_after_a_look_in_inference_mode(model: Model) -> None:
    with torch.inference_mode():
        model(ids())
    losses = losses_by_hand(model)
    assert losses[-1] < losses[0] / 2


def test_a_trained_model_is_trained_on_by_hand(tmp_path: Path) -> None:
    """Also where the run's own optimizer updated tables row by row."""
    experiment = tiny(tmp_path, *QUIET, PEER, ROWS, "training.max_steps=2", "schedule.warmup_steps=0")
    losses = losses_by_hand(graft.train(experiment, out=tmp_path / "run", stream=io.StringIO()).model)
    assert losses[-1] < losses[0] / 2


def test_copies_give_the_same_numbers(model: Model, tmp_path: Path) -> None:
    model.eval()
    saved = io.BytesIO()
    torch.save(model.state_dict(), saved)
    saved.seek(0)
    loaded = graft.build(tiny(tmp_path, *QUIET, PEER, "seed=1")).eval()
    assert not torch.equal(loaded(ids()), model(ids()))
    loaded.load_state_dict(torch.load(saved))
    for other in (loaded, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(ids()), model(ids()))


def test_other_dtypes(model: Model) -> None:
    model.eval()
    expected = model(ids())
    torch.testing.assert_close(copy.deepcopy(model).double()(ids()), expected.double(), rtol=1e-4, atol=1e-5)
    rounded = copy.deepcopy(model).bfloat16()(ids())
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, expected, rtol=0.1, atol=0.02)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # of dynamo's own making
def test_compiled_as_a_whole(compiling: None, tmp_path: Path) -> None:
    model = graft.build(tiny(tmp_path, *QUIET)).eval()
    torch.testing.assert_close(torch.compile(model)(ids()), model(ids()), rtol=1e-4, atol=1e-5)


@pytest.fixture
def _shapes_unchecked() -> Iterator[None]:
    """As in a person's program: the tests' own shape checks would speak first."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.usefixtures("_shapes_unchecked")
def test_what_is_no_batch_of_ids_is_said(model: Model) -> None:
    model.eval()
    with pytest.raises(ConfigError, match=r"shape \(9,\) and int64; expected token ids \[batch, time\].*ids\[None\]"):
        model(ids()[0])
    with pytest.raises(ConfigError, match=r"shape \(2, 9\) and float32; expected token ids"):
        model(ids().float())
    assert torch.equal(model(ids().int()), model(ids()))


def test_prompts_of_ids_may_be_tensors(model: Model) -> None:
    expected = graft.generate(model, ids().tolist(), max_new_tokens=3)
    forms: list[Any] = [ids(), list(ids()), ids().numpy()]
    for prompts in forms:
        assert graft.generate(model, prompts, max_new_tokens=3) == expected


@pytest.mark.parametrize("prompt", ["the", [1, 2], torch.tensor([1, 2])], ids=["text", "list", "tensor"])
def test_one_prompt_by_itself_is_no_list_of_prompts(model: Model, prompt: str | list[int] | Tensor) -> None:
    with pytest.raises(ConfigError, match=r"one prompt by itself; give a list of prompts: \[prompt\]"):
        graft.generate(model, prompt, max_new_tokens=3)  # pyright: ignore[reportArgumentType]
