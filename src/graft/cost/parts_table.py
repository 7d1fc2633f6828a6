"""Every part side by side at one shape: parameters, FLOPs, decode state, and speeds that were measured elsewhere."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from pydantic import ValidationError

from graft.config.describe import plain_value
from graft.config.families import PartConfig
from graft.config.fields import tag_of
from graft.config.includes import preset_folders
from graft.config.load import load_experiment
from graft.config.model import ModelConfig
from graft.config.registry import PACKAGES, UNIONS, variants
from graft.cost.counts import PartCost, idle_shared_parameters, part_costs
from graft.errors import ConfigError
from graft.model import Model

HIDDEN_SIZE = 512
SEQ_LEN = 1024
VOCAB_SIZE = 8192

COMMON: dict[str, Any] = {
    "num_heads": 8,
    "num_k_heads": 8,
    "head_dim": 64,
    "v_head_dim": 64,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "sliding_window": 256,
    "intermediate_size": 2048,
    "product_key_dims": (128, 128),
    "num_slots": 4096,
    "table_size": 16384,
    "row_dim": 64,
}
"""What fields of these names are set to where a part must be told; required fields of other names are as in its
preset."""

TITLES = {"token_mixer": "Token mixers", "channel_mixer": "Channel mixers", "memory": "Memories"}

COLUMNS = ("type", "settings", "parameters", "active", "FLOPs per token", "state bytes", "training", "decoding")


@dataclass(frozen=True)
class Speed:
    """Tokens per second of one layer with this part alone.

    Args:
        training: forward and backward pass.
        decoding: one token after the other, one sequence.
    """

    training: float
    decoding: float


@dataclass(frozen=True)
class Measured:
    """What a machine made of the parts.

    Args:
        where: the machine, the date, and how it was measured.
        speeds: by ``family.type``.
    """

    where: str
    speeds: Mapping[str, Speed]

    @classmethod
    def from_json(cls, text: str) -> Measured:
        """The inverse of `to_json`."""
        data = json.loads(text)
        return cls(data["where"], {name: Speed(**speed) for name, speed in data["speeds"].items()})

    def to_json(self) -> str:
        """As it is kept in a file."""
        speeds = {name: {"training": s.training, "decoding": s.decoding} for name, s in sorted(self.speeds.items())}
        return json.dumps({"where": self.where, "speeds": speeds}, indent=1) + "\n"


def part_variants() -> Iterator[tuple[str, str, type[PartConfig]]]:
    """Family, type and config class of everything that joins the residual stream."""
    for family in UNIONS["part"]:
        for tag, cls in variants(family).items():
            yield family, tag, cast(type[PartConfig], cls)


def common_part(family: str, tag: str) -> PartConfig:
    """A variant at the common shape: its defaults, and what it must be told from `COMMON` or else from its preset.

    Raises:
        ConfigError: it has no preset that shows it.
    """
    return at_common_shape(_shown_in_preset(family, tag))


def _shown_in_preset(family: str, tag: str) -> PartConfig:
    """The first part of this type in the variant's preset."""
    name = f"{PACKAGES[family].rpartition('.')[2]}/{tag}.yaml"
    for folder in preset_folders():
        if (folder / name).is_file():
            parts = (part for parts in load_experiment(folder / name).model.blocks.values() for part in parts)
            for part in parts:
                if part.tag == tag:
                    return part
    raise ConfigError(
        f"no preset shows the {family} '{tag}'", where=f"presets/{name}", fix="add a config with such a part"
    )


def at_common_shape(part: PartConfig) -> PartConfig:
    """The part with what is required alone, or, where that makes no part, with all that is set; sizes from `COMMON`."""
    cls = type(part)
    required = {name for name, info in cls.model_fields.items() if info.is_required()}
    for names in (required, part.model_fields_set):
        told = {name: _common_value(name, getattr(part, name)) for name in sorted(names - {"type"})}
        try:
            config = cls.model_validate({"type": tag_of(cls), **told})
        except ValidationError:
            continue
        if not list(config.problems_in(HIDDEN_SIZE)):
            return config
    return part


def _common_value(name: str, value: Any) -> Any:
    if name in COMMON and value is not None:
        return COMMON[name]
    if isinstance(value, PartConfig):
        return at_common_shape(value)
    if isinstance(value, tuple):
        return tuple(_common_value(name, item) for item in cast(tuple[Any, ...], value))
    return value


def one_layer(part: PartConfig) -> ModelConfig:
    """A network of one layer that holds the part alone, `HIDDEN_SIZE` wide."""
    return ModelConfig.model_validate(
        {
            "hidden_size": HIDDEN_SIZE,
            "num_layers": 1,
            "vocab_size": VOCAB_SIZE,
            "norm": {"type": "rms_norm"},
            "blocks": {"layer": [part]},
        }
    )


def cost_at_common_shape(part: PartConfig) -> PartCost:
    """Parameters (with those it shares with other layers), FLOPs and decode state for documents of `SEQ_LEN` positions.

    State in fp32. Nothing is allocated.
    """
    with torch.device("meta"):
        model = Model(one_layer(part), VOCAB_SIZE)
    (cost,) = part_costs(model, SEQ_LEN, torch.float32)
    shared = sum(p.numel() for p in model.shared.parameters())
    active = cost.active_parameters + shared - idle_shared_parameters(model)
    return replace(cost, parameters=cost.parameters + shared, active_parameters=active)


def parts_markdown(measured: Measured | None = None) -> str:
    """The table of all parts, as a page.

    Args:
        measured: speeds; None leaves their columns out.

    Raises:
        ConfigError: a variant has no preset.
    """
    columns = COLUMNS if measured is not None else COLUMNS[:-2]
    sections = [_introduction(measured)]
    for family in UNIONS["part"]:
        rows = [_row(name, tag, measured) for name, tag, _ in part_variants() if name == family]
        if rows:
            sections.append(f"## {TITLES[family]}\n\n" + _table(columns, rows))
    return "\n\n".join(sections) + "\n"


def _introduction(measured: Measured | None) -> str:
    told = ", ".join(f"`{name}` {list(value) if isinstance(value, tuple) else value}" for name, value in COMMON.items())
    text = (
        "# Parts\n\n"
        "<!-- made by `graft parts --markdown`; do not edit -->\n\n"
        f"Every part by itself in a stream of {HIDDEN_SIZE} channels, with its defaults, and for documents of "
        f"{SEQ_LEN} tokens. What a part must be told is {told}, or else as in its preset.\n\n"
        "Parameters: with those shared with other layers. `active`: those that take part in computing one position. "
        "FLOPs: of one forward pass, matrix products "
        f"and visible pairs only. State: what a sequence of {SEQ_LEN} tokens keeps while decoding in fp32."
    )
    if measured is None:
        return text
    return text + f" The last two columns are tokens per second of one layer, measured: {measured.where}"


def _row(family: str, tag: str, measured: Measured | None) -> list[str]:
    part = common_part(family, tag)
    cost = cost_at_common_shape(part)
    active = "all" if cost.active_parameters == cost.parameters else f"{cost.active_parameters:,}"
    cells = [
        f"`{tag}`",
        _settings(part),
        f"{cost.parameters:,}",
        active,
        f"{cost.forward_flops_per_token:,.0f}",
        f"{cost.state_bytes:,}",
    ]
    if measured is None:
        return cells
    speed = measured.speeds.get(f"{family}.{tag}")
    return cells + (["not measured"] * 2 if speed is None else [f"{speed.training:,.0f}", f"{speed.decoding:,.0f}"])


def _settings(part: PartConfig) -> str:
    told = part.model_dump(mode="json", exclude_unset=True)
    words = [f"{name}: {_flow(value)}" for name, value in told.items() if name != "type"]
    return f"`{', '.join(words)}`" if words else "defaults"


def _flow(value: Any) -> str:
    """A value as it would be written on one line of a config."""
    if isinstance(value, dict):
        table = cast(dict[str, Any], value)
        order = ["type", *(key for key in table if key != "type")] if "type" in table else list(table)
        return "{" + ", ".join(f"{key}: {_flow(table[key])}" for key in order) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_flow(item) for item in cast(list[Any], value)) + "]"
    return plain_value(value)


def _table(columns: tuple[str, ...], rows: list[list[str]]) -> str:
    lines = [list(columns), ["---", "---", *["---:"] * (len(columns) - 2)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
