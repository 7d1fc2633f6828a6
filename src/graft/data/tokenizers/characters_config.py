"""Config of the character tokenizer."""

from typing import Literal

from graft.config.base import knob
from graft.config.families import TokenizerConfig


class CharactersTokenizerConfig(TokenizerConfig):
    """Every character of the training text, sorted, and an end-of-document id; others are an error when encoded."""

    implementation = "graft.data.tokenizers.characters:CharactersTokenizer"
    type: Literal["characters"] = knob("characters", "tag")
