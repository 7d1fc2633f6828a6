"""Config of a tokenizer kept in files."""

from typing import Literal

from graft.config.base import knob
from graft.config.families import TokenizerConfig


class FileTokenizerConfig(TokenizerConfig):
    """A ``tokenizer.json``, or a Hugging Face folder that holds one."""

    implementation = "graft.data.tokenizers.file:FileTokenizer"
    type: Literal["file"] = knob("file", "tag")
    path: str = knob(doc="tokenizer.json, or a folder with it")
    end_of_document: str | None = knob(
        None, "the end-of-document token; null = eos_token of the folder's settings, or <|endoftext|>"
    )
