"""Byte-level BPE trained on the run's own training documents."""

from __future__ import annotations

from collections.abc import Iterable

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from graft.data.tokenizers.base import utf8
from graft.data.tokenizers.bpe_config import BpeTokenizerConfig
from graft.data.tokenizers.byte_level import GPT2_PATTERN, SINGLE_DIGITS_PATTERN
from graft.data.tokenizers.hugging_face import HuggingFaceTokenizer
from graft.errors import DataError

END_TOKEN = "<|endoftext|>"


class BpeTokenizer(HuggingFaceTokenizer):
    """Byte-pair encoding over UTF-8 bytes.

    Sources: Neural Machine Translation of Rare Words with Subword Units (1508.07909); the byte alphabet and the
    pre-tokenizer pattern are GPT-2's. Training is the tokenizers library's and gives the same ids on every run and
    with any number of threads. Id 0 ends a document, ids 1-256 are the bytes, the rest are merges in their order.

    Deviations from GPT-2: with ``split_digits`` every digit is a piece of its own; the end-of-document id is the first
    and not the last.
    """

    config: BpeTokenizerConfig

    def train(self, documents: Iterable[str]) -> None:
        plain = tokenizers.Tokenizer(models.BPE())
        pattern = SINGLE_DIGITS_PATTERN if self.config.split_digits else GPT2_PATTERN
        split = pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
        to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        plain.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])  # pyright: ignore[reportAttributeAccessIssue]
        plain.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
        trainer = trainers.BpeTrainer(
            vocab_size=self.config.vocab_size,
            min_frequency=self.config.min_frequency,
            special_tokens=[END_TOKEN],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        checked = (text for text in documents if utf8(text) is not None)
        plain.train_from_iterator(checked, trainer)
        found = plain.get_vocab_size()
        if found < self.config.vocab_size:
            raise DataError(
                f"the training text has repeated pairs for {found} ids only",
                where="data.tokenizer.vocab_size",
                expected=f"{self.config.vocab_size} ids",
                fix=f"set data.tokenizer.vocab_size to at most {found}, lower data.tokenizer.min_frequency, or train "
                "on more text",
            )
        self.load(plain.to_str(), END_TOKEN, "the trained tokenizer")
