"""What makes two runs the same run, and a config that reproduces one."""

from __future__ import annotations

import hashlib
import io
import json
from typing import Any, cast

from ruamel.yaml import YAML
from ruamel.yaml.representer import RoundTripRepresenter

from graft.config.base import Config
from graft.config.experiment import SEMANTIC_FIELDS, Experiment
from graft.config.tree import Path, dotted

_MISSING = "(absent)"


def semantic_data(experiment: Experiment) -> dict[str, Any]:
    """The part of a config that decides the numbers, in one canonical form.

    Defaults are written out, and per-layer overrides are replaced by the layers they lead to: their order can matter,
    their spelling does not.
    """
    data = {name: experiment.to_dict()[name] for name in SEMANTIC_FIELDS}
    model = cast(dict[str, Any], data["model"])
    if model.pop("overrides"):
        model["layers"] = [[part.to_dict() for part in parts] for parts in experiment.model.layers()]
    return data


def semantic_hash(experiment: Experiment) -> str:
    """32 hex digits (BLAKE2b) over `semantic_data`: equal for two configs that compute the same numbers.

    File format, order of keys, spelled-out defaults, ``name``, ``runtime``, ``logging``, ``evaluation`` and
    ``checkpoint`` do not enter.
    """
    text = json.dumps(semantic_data(experiment), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def run_id(experiment: Experiment) -> str:
    """``<name>-<the first 8 digits of the semantic hash>``: the run directory's name."""
    return f"{experiment.name}-{semantic_hash(experiment)[:8]}"


class _Representer(RoundTripRepresenter):
    """Writes null as ``null``, not as nothing."""

    def represent_none(self, data: Any) -> Any:
        return self.represent_scalar("tag:yaml.org,2002:null", "null")  # pyright: ignore[reportUnknownMemberType]


_Representer.add_representer(type(None), _Representer.represent_none)  # pyright: ignore[reportUnknownMemberType]


def resolved_yaml(experiment: Experiment) -> str:
    """The whole config with every default written out, as YAML 1.2 that loads back to an equal experiment."""
    stream = io.StringIO()
    yaml: Any = YAML()
    yaml.Representer = _Representer
    yaml.width = 10_000  # no line breaks inside text
    yaml.dump(experiment.to_dict(), stream)
    return f"# {run_id(experiment)}: every setting, defaults included\n{stream.getvalue()}"


def config_diff(a: Config, b: Config) -> list[tuple[str, Any, Any]]:
    """Where two configs differ, defaults written out: ``(path, value in a, value in b)``, in the order of ``a``.

    A table or list that only one of them has is one entry; what is missing is shown as ``(absent)``.
    """
    return list(_differences(a.to_dict(), b.to_dict(), ()))


def _differences(a: Any, b: Any, path: Path) -> list[tuple[str, Any, Any]]:
    if isinstance(a, dict) and isinstance(b, dict):
        left, right = cast(dict[str, Any], a), cast(dict[str, Any], b)
        keys: list[str | int] = list(dict.fromkeys([*left, *right]))
        pairs = [(key, left.get(str(key), _MISSING), right.get(str(key), _MISSING)) for key in keys]
    elif isinstance(a, list) and isinstance(b, list) and len(cast(list[Any], a)) == len(cast(list[Any], b)):
        pairs = [(i, x, y) for i, (x, y) in enumerate(zip(cast(list[Any], a), cast(list[Any], b), strict=True))]
    else:
        return [] if a == b and isinstance(a, bool) == isinstance(b, bool) else [(dotted(path), a, b)]
    return [found for key, x, y in pairs for found in _differences(x, y, (*path, key))]
