"""Config of byte-level BPE trained on the run's own training text."""

from typing import Literal

from graft.config.base import knob
from graft.config.families import TokenizerConfig


class BpeTokenizerConfig(TokenizerConfig):
    """Byte-level byte-pair encoding trained deterministically on the training documents (1508.07909, GPT-2)."""

    implementation = "graft.data.tokenizers.bpe:BpeTokenizer"
    type: Literal["bpe"] = knob("bpe", "tag")
    vocab_size: int = knob(doc="ids in all, the 256 bytes and the end-of-document id included", ge=257)
    split_digits: bool = knob(True, "every digit is a token of its own (better arithmetic)")
    min_frequency: int = knob(2, "pairs seen less often are not merged", ge=1)
