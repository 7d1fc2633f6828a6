"""Every tokenizer: round trips, bytes per token, save and load, and equal ids on the fast and the plain way."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, trainers

from graft.data.tokenizers.base import Tokenizer, load_tokenizer
from graft.data.tokenizers.bpe import BpeTokenizer
from graft.data.tokenizers.bpe_config import BpeTokenizerConfig
from graft.data.tokenizers.byte_level import byte_of_character, bytes_of_token
from graft.data.tokenizers.bytes import BytesTokenizer
from graft.data.tokenizers.bytes_config import BytesTokenizerConfig
from graft.data.tokenizers.characters_config import CharactersTokenizerConfig
from graft.data.tokenizers.file_config import FileTokenizerConfig
from graft.data.tokenizers.tiktoken_path import TiktokenPath
from graft.errors import DataError

WORDS = "the cat sat on the mat and the dog's 42 fleas can't sit still; they'll jump 1234 times, naïve café 中文 "
TEXT = [WORDS * 3, "aaaa aaaaaaaa aaa\n\n\tdef f(x):\n    return x\n" * 5, "Zürich über alles " * 4]


def trained_bpe(vocab_size: int = 330, **settings: object) -> BpeTokenizer:
    tokenizer = BpeTokenizerConfig.model_validate({"vocab_size": vocab_size, **settings}).build()
    tokenizer.train(TEXT)
    return tokenizer


BPE = trained_bpe()
BYTES = BytesTokenizerConfig().build()


@given(st.text())
def test_bytes_and_bpe_give_back_any_unicode(text: str) -> None:
    for tokenizer in (BYTES, BPE):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.end_of_document not in ids
        assert tokenizer.token_bytes()[ids].sum() == len(text.encode())


@given(
    st.text(
        alphabet=st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from(" a\n\t'ts19é中")), max_size=80
    )
)
def test_the_fast_way_gives_the_ids_of_the_plain_way(text: str) -> None:
    assert BPE.fast is not None
    assert BPE.fast.encode_batch([text, text])[1].tolist() == BPE.encode_plain(text)


def test_a_wrong_fast_way_is_dropped() -> None:
    tokenizer = trained_bpe()
    assert tokenizer.fast is not None
    ranks = {b: i for b, i in tokenizer.fast._encoding._mergeable_ranks.items() if b != b"the"}
    tokenizer.fast = TiktokenPath(r"(?s:.)+", ranks)
    tokenizer.check_sample(TEXT)
    assert tokenizer.fast is None
    assert tokenizer.decode(tokenizer.encode(WORDS)) == WORDS


def test_without_tiktoken_the_ids_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tiktoken", None)
    plain = trained_bpe()
    assert plain.fast is None
    assert plain.fingerprint() == BPE.fingerprint()
    assert [a.tolist() for a in plain.encode_batch(TEXT)] == [a.tolist() for a in BPE.encode_batch(TEXT)]


def test_special_tokens_in_a_text_are_text() -> None:
    text = "before <|endoftext|> after"
    for ids in (BPE.encode(text), BPE.encode_plain(text)):
        assert BPE.end_of_document not in ids
        assert BPE.decode(ids) == text
    assert BPE.decode([BPE.end_of_document, *BPE.encode("x"), BPE.end_of_document]) == "x"


def test_digits_are_split_only_when_asked() -> None:
    numbers = ["7777 7777 7777 " * 20]
    joined = BpeTokenizerConfig(vocab_size=260, split_digits=False).build()
    joined.train(numbers)
    single = BpeTokenizerConfig(vocab_size=258, split_digits=True, min_frequency=1).build()
    with pytest.raises(DataError, match="257 ids only"):
        single.train(numbers)
    assert len(joined.encode("7777")) < 4
    assert len(BPE.encode("1234")) == 4


def test_training_is_deterministic_and_the_ids_are_in_order() -> None:
    again = trained_bpe()
    assert again.fingerprint() == BPE.fingerprint()
    assert trained_bpe(320).fingerprint() != BPE.fingerprint()
    assert BPE.end_of_document == 0
    sizes = BPE.token_bytes()
    assert len(sizes) == BPE.vocab_size == 330
    assert (sizes[1:257] == 1).all()
    assert (sizes[257:] >= 2).all()


def test_characters_are_sorted_and_unknown_ones_are_named() -> None:
    tokenizer = CharactersTokenizerConfig().build()
    tokenizer.train(["hello", "wörld\n"])
    assert tokenizer.characters == "".join(sorted(set("hellowörld\n")))
    assert tokenizer.vocab_size == len(tokenizer.characters) + 1
    assert tokenizer.encode("hö\n") == [tokenizer.characters.index(c) for c in "hö\n"]
    assert tokenizer.decode([*tokenizer.encode("wörld"), tokenizer.end_of_document]) == "wörld"
    assert tokenizer.token_bytes()[tokenizer.encode("ö")] == 2
    with pytest.raises(DataError, match=r"'q' \(U\+0071\), '€' \(U\+20AC\)"):
        tokenizer.encode("hq€")


@pytest.mark.parametrize("kind", ["bytes", "characters", "bpe", "file"])
def test_save_and_load_give_the_same_tokenizer(kind: str, tmp_path: Path) -> None:
    tokenizer = make(kind, tmp_path)
    tokenizer.save(tmp_path / "saved")
    loaded = load_tokenizer(tmp_path / "saved")
    copy = pickle.loads(pickle.dumps(tokenizer))
    for other in (loaded, copy):
        assert other.fingerprint() == tokenizer.fingerprint()
        assert (other.vocab_size, other.end_of_document) == (tokenizer.vocab_size, tokenizer.end_of_document)
        assert other.encode(WORDS) == tokenizer.encode(WORDS)
        assert np.array_equal(other.token_bytes(), tokenizer.token_bytes())


def make(kind: str, folder: Path) -> Tokenizer:
    if kind == "file":
        (folder / "tokenizer.json").write_text(BPE.raw, encoding="utf-8")
        return FileTokenizerConfig(path=str(folder)).build()
    if kind == "bpe":
        return BPE
    tokenizer = BYTES if kind == "bytes" else CharactersTokenizerConfig().build()
    tokenizer.train([WORDS])
    return tokenizer


def test_a_changed_or_missing_tokenizer_is_noticed(tmp_path: Path) -> None:
    tokenizer = CharactersTokenizerConfig().build()
    tokenizer.train(["abc"])
    tokenizer.save(tmp_path)
    (tmp_path / "characters.txt").write_text("abcd")
    with pytest.raises(DataError, match="changed since"):
        load_tokenizer(tmp_path)
    (tmp_path / "graft_tokenizer.json").write_text("{")
    with pytest.raises(DataError, match="cannot be read"):
        load_tokenizer(tmp_path)
    with pytest.raises(DataError, match="no tokenizer here"):
        load_tokenizer(tmp_path / "nowhere")


def test_the_end_token_of_a_folder(tmp_path: Path) -> None:
    spec = json.loads(BPE.raw)
    spec["added_tokens"].append({**spec["added_tokens"][0], "id": 330, "content": "</s>"})
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    assert FileTokenizerConfig(path=str(tmp_path)).build().end_of_document == 0
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "</s>"}}))
    tokenizer = FileTokenizerConfig(path=str(tmp_path / "tokenizer.json")).build()
    assert (tokenizer.end_of_document, tokenizer.vocab_size) == (330, 331)
    assert FileTokenizerConfig(path=str(tmp_path), end_of_document="<|endoftext|>").build().end_of_document == 0
    with pytest.raises(DataError, match="'nope' is not in the vocabulary"):
        FileTokenizerConfig(path=str(tmp_path), end_of_document="nope").build()
    with pytest.raises(DataError, match=r"correct data\.tokenizer\.path"):
        FileTokenizerConfig(path=str(tmp_path / "missing")).build()
    (tmp_path / "tokenizer.json").write_text('{"not": "one"}')
    with pytest.raises(DataError, match=r"not a tokenizer\.json"):
        FileTokenizerConfig(path=str(tmp_path)).build()


def test_bytes_of_a_sentencepiece_like_vocabulary(tmp_path: Path) -> None:
    plain = tokenizers.Tokenizer(models.BPE(byte_fallback=True))
    plain.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")  # pyright: ignore[reportAttributeAccessIssue]
    plain.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="never")])  # pyright: ignore[reportAttributeAccessIssue]
    fallback = [f"<0x{b:02X}>" for b in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["</s>"],
        initial_alphabet=list("abcdefghijklmnopqrstuvwxyz▁"),
        show_progress=False,
    )
    plain.train_from_iterator(["the cat sat on the mat and the hat"] * 9, trainer)
    plain.add_tokens([])
    spec = json.loads(plain.to_str())
    for token in fallback:
        spec["model"]["vocab"][token] = len(spec["model"]["vocab"])
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    tokenizer = FileTokenizerConfig(path=str(tmp_path), end_of_document="</s>").build()
    assert tokenizer.fast is None
    for text in ("the cat sat on a mat", "the ünïcode hat"):
        assert tokenizer.token_bytes()[tokenizer.encode(text)].sum() == len(text.encode())


def test_word_level_tokenizers_are_refused(tmp_path: Path) -> None:
    plain = tokenizers.Tokenizer(models.WordLevel({"a": 0, "<|endoftext|>": 1}, unk_token="a"))
    plain.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match="bytes per token are not known"):
        FileTokenizerConfig(path=str(tmp_path)).build()


def test_the_byte_alphabet_is_the_library_s() -> None:
    assert sorted(byte_of_character()) == sorted(pre_tokenizers.ByteLevel.alphabet())
    assert sorted(byte_of_character().values()) == list(range(256))
    pieces = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str("é \n中")
    assert bytes_of_token(pieces[0][0]) == "é \n中".encode()


def test_lone_surrogates_are_refused() -> None:
    for tokenizer in (BYTES, BPE):
        with pytest.raises(DataError, match=r"U\+D800 at character 2"):
            tokenizer.encode("ab\ud800")


@pytest.mark.slow
def test_both_regex_engines_class_every_code_point_alike() -> None:
    assert BPE.fast is not None
    codes = [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    texts = ["".join(f"{c}a {c}1" for c in codes[i : i + 4096]) for i in range(0, len(codes), 4096)]
    for text, ids in zip(texts, BPE.fast.encode_batch(texts), strict=True):
        assert ids.tolist() == BPE.encode_plain(text)


def test_very_long_runs_do_not_break_the_fast_way() -> None:
    assert BPE.fast is not None
    for run in (" " * 200_000, "a" * 50_000, "\n" * 100_000 + "x"):
        assert BPE.decode(BPE.encode(run)) == run


def test_the_bytes_tokenizer_matches_its_definition() -> None:
    assert isinstance(BYTES, BytesTokenizer)
    assert BYTES.encode("é") == [0xC3, 0xA9]
    assert (BYTES.vocab_size, BYTES.end_of_document) == (257, 256)
    assert BYTES.decode([0xC3, 256]) == "�"
