"""Config of concatenating packing."""

from typing import Literal

from graft.config.base import knob
from graft.config.families import PackingConfig


class ConcatPackingConfig(PackingConfig):
    """Documents end to end, cut every ``seq_len`` tokens: no padding, documents may be split."""

    implementation = "graft.data.packing.concat:ConcatPacking"
    type: Literal["concat"] = knob("concat", "tag")
    document_mask: bool = knob(True, "documents in a row do not see each other and restart their positions")
