"""Classes of token ids: which texts are one, and that they are saved with the model."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch

from graft import api
from graft.data.tokenizers.bytes_config import BytesTokenizerConfig
from graft.initialization import initialize
from graft.memories.canonical_ids import CanonicalIds, canonical_classes
from graft.model import Model
from graft.training.load import load_run
from tiny_run import tiny

MEMORY = "{type: ngram, table_size: 50, num_hash_heads: 2, row_dim: 4}"
NGRAM = f"model.blocks={{main: [{MEMORY}, {{type: attention, num_heads: 2, position: {{type: rope}}}}]}}"


@pytest.mark.parametrize(
    ("texts", "classes"),
    [
        (["the", "The", " the", "THE ", "then"], [0, 0, 0, 0, 4]),
        (["ﬁ", "fi", "Straße", "STRASSE", "Ａ", "a"], [0, 0, 2, 2, 4, 4]),
        (["e", "é", "e\u0301"], [0, 1, 1]),  # an accent is kept, however it is written
        ([" ", "\n", "  ", ""], [0, 0, 0, 3]),
        (["", "", "\ufffd", "\ufffd"], [0, 1, 2, 3]),  # special ids and parts of characters are nobody else's
    ],
)
def test_texts_that_are_one(texts: list[str], classes: list[int]) -> None:
    assert canonical_classes(texts) == classes


def test_ids_are_their_own_classes_until_a_tokenizer_says_otherwise() -> None:
    module = CanonicalIds(300)
    initialize(module, 0)
    assert torch.equal(module(torch.arange(300)), torch.arange(300))
    module.read_tokenizer(BytesTokenizerConfig().build())
    ids = torch.tensor([[ord("A"), ord("a"), ord("Z"), ord("7"), 200, 201, 299]])
    assert module(ids).tolist() == [[ord("A"), ord("A"), ord("Z"), ord("7"), 200, 201, 299]]


def classes_of(model: Model) -> torch.Tensor:
    found = [m for m in model.modules() if isinstance(m, CanonicalIds)]
    assert len(found) == 1  # one for all layers
    return found[0].classes


def test_a_run_takes_them_from_its_tokenizer_and_keeps_them(tmp_path: Path) -> None:
    experiment = tiny(tmp_path, NGRAM, "training.max_steps=2")
    built = classes_of(api.build(experiment))
    assert built[ord("q")] == ord("Q")
    run = api.train(experiment, out=tmp_path / "run", stream=io.StringIO())
    assert torch.equal(classes_of(run.model), built)
    loaded = load_run(tmp_path / "run", dtype=torch.bfloat16).model
    assert classes_of(loaded).dtype == torch.int64
    assert torch.equal(classes_of(loaded), built)


def test_ids_as_they_are_need_no_tokenizer(tmp_path: Path) -> None:
    model = api.build(tiny(tmp_path, NGRAM.replace("row_dim", "canonicalize: false, row_dim")))
    assert not model.uses_tokenizer()
    assert not any(isinstance(m, CanonicalIds) for m in model.modules())
