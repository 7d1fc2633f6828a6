"""Config of the byte tokenizer."""

from typing import Literal

from graft.config.base import knob
from graft.config.families import TokenizerConfig


class BytesTokenizerConfig(TokenizerConfig):
    """UTF-8 bytes, one id each, and an end-of-document id: 257 ids, no file."""

    implementation = "graft.data.tokenizers.bytes:BytesTokenizer"
    type: Literal["bytes"] = knob("bytes", "tag")
