"""Config of best-fit packing."""

from typing import Literal

from graft.config.base import knob
from graft.config.families import PackingConfig


class BestFitPackingConfig(PackingConfig):
    """Whole documents by best-fit decreasing (2404.10830); splits those longer than ``seq_len``, pads rows."""

    implementation = "graft.data.packing.best_fit:BestFitPacking"
    type: Literal["best_fit"] = knob("best_fit", "tag")
