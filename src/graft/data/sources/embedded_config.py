"""Config of the embedded corpus."""

from typing import Literal

from graft.config.base import knob
from graft.config.families import SourceConfig


class EmbeddedSourceConfig(SourceConfig):
    """Prose of the running Python's own documentation and docstrings, harvested live; needs no files and no network."""

    implementation = "graft.data.sources.embedded:EmbeddedSource"
    type: Literal["embedded"] = knob("embedded", "tag")
    max_characters: int | None = knob(None, "stop after this many characters; null = all (about 2 million)", ge=1000)
