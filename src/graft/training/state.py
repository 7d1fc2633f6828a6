"""Any nested state (optimizer, RNG, data position) as named tensors and one JSON document, and exactly back.

No pickle: what JSON has a word for is written as it is; the rest is an object with a ``$`` key:

``{"$": "tensor", "name": n}``, ``{"$": "tuple", "items": […]}``, ``{"$": "dict", "items": [[key, value], …]}`` (keys
that are not all strings), ``{"$": "int", "hex": h}`` (beyond 64 bits), ``{"$": "float", "bits": h}`` (NaN with its
payload, and infinities), ``{"$": "dtype", "name": n}``.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

TAG = "$"

STORABLE_DTYPES = frozenset(
    {
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
        torch.complex64, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint64, torch.uint32, torch.uint16,
        torch.uint8, torch.bool,
    }
)  # fmt: skip
"""The dtypes safetensors has a name for."""

Document = dict[str, Any]


def flatten_state(state: Any) -> tuple[dict[str, Tensor], Document]:
    """Splits nested dicts, lists and tuples of tensors and scalars.

    Scalars are int, float, bool, str, None and torch.dtype; dict keys are any of them. Floats come back bit for bit,
    tensors with dtype and shape; the same tensor object twice is stored once and comes back as one object.
    What does *not* come back: a mapping's class (it becomes a dict), a tensor's device and requires_grad.

    Returns:
        named tensors (the leaves themselves, not copies) and a JSON document for `unflatten_state`.

    Raises:
        TypeError: something else is inside; names the place.
    """
    flattener = _Flattener()
    return flattener.tensors, {"state": flatten_value(state, flattener)}


def unflatten_state(tensors: Mapping[str, Tensor], document: Mapping[str, Any]) -> Any:
    """The state that `flatten_state` split. Tensors are copied: they do not alias a mapped file.

    Raises:
        ValueError: the document is none of `flatten_state`'s, or names a tensor that is not there.
    """
    copies: dict[str, Tensor] = {}

    def tensor(name: str) -> Tensor:
        if name not in copies:
            copies[name] = tensors[name].clone()
        return copies[name]

    try:
        return _restore(document["state"], tensor)
    except KeyError as error:
        raise ValueError(f"the stored state lacks {error}") from None
    except (TypeError, AttributeError, struct.error) as error:
        raise ValueError(f"the stored state cannot be read: {error}") from None


class _Flattener:
    """Names for the tensors met so far."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._names: dict[int, str] = {}

    def name(self, tensor: Tensor, path: str) -> str:
        known = self._names.get(id(tensor))
        if known is not None:
            return known
        # safetensors keeps this name for itself, and two paths may read the same ("a.b" and "a", "b")
        base = path.encode("ascii", "backslashreplace").decode() or "tensor"
        name, count = base, 1
        while name in self.tensors or name == "__metadata__":
            count += 1
            name = f"{base}~{count}"
        self.tensors[name] = tensor
        self._names[id(tensor)] = name
        return name


def flatten_value(value: Any, flattener: _Flattener, path: str = "") -> Any:
    """The JSON form of one value; its tensors go to ``flattener``. Raises TypeError."""
    if isinstance(value, Tensor):
        if value.dtype not in STORABLE_DTYPES or value.layout != torch.strided:
            raise TypeError(f"state{_at(path)}: a {value.layout} tensor of {value.dtype} cannot be stored")
        return {TAG: "tensor", "name": flattener.name(value, path)}
    if isinstance(value, Mapping):
        return _flatten_mapping(value, flattener, path)
    if type(value) in (list, tuple):
        items = [flatten_value(item, flattener, _join(path, i)) for i, item in enumerate(value)]
        return items if type(value) is list else {TAG: "tuple", "items": items}
    return _flatten_scalar(value, path)


def _flatten_mapping(mapping: Mapping[Any, Any], flattener: _Flattener, path: str) -> Any:
    items = [(key, flatten_value(item, flattener, _join(path, key))) for key, item in mapping.items()]
    if all(type(key) is str for key in mapping) and TAG not in mapping:
        return dict(items)
    return {TAG: "dict", "items": [[_flatten_scalar(key, path), item] for key, item in items]}


def _flatten_scalar(value: Any, path: str) -> Any:
    if value is None or type(value) in (bool, str):
        return value
    if type(value) is int:
        return value if -(2**63) <= value < 2**63 else {TAG: "int", "hex": hex(value)}
    if type(value) is float:
        # json writes repr(value), which names exactly one float64
        return value if math.isfinite(value) else {TAG: "float", "bits": struct.pack(">d", value).hex()}
    if isinstance(value, torch.dtype):
        return {TAG: "dtype", "name": str(value).removeprefix("torch.")}
    raise TypeError(f"state{_at(path)}: a {type(value).__name__} cannot be stored; convert it to tensors and scalars")


def _join(path: str, key: Any) -> str:
    return f"{path}.{key}" if path else str(key)


def _at(path: str) -> str:
    return f" at {path}" if path else ""


def _restore(value: Any, tensor: Callable[[str], Tensor]) -> Any:
    if isinstance(value, list):
        return [_restore(item, tensor) for item in value]
    if not isinstance(value, dict):
        return value
    if TAG not in value:
        return {key: _restore(item, tensor) for key, item in value.items()}
    return _RESTORERS[value[TAG]](value, tensor)


_RESTORERS: dict[str, Callable[[Mapping[str, Any], Callable[[str], Tensor]], Any]] = {
    "tensor": lambda value, tensor: tensor(value["name"]),
    "tuple": lambda value, tensor: tuple(_restore(item, tensor) for item in value["items"]),
    "dict": lambda value, tensor: {_restore(k, tensor): _restore(item, tensor) for k, item in value["items"]},
    "int": lambda value, _: int(value["hex"], 16),
    "float": lambda value, _: struct.unpack(">d", bytes.fromhex(value["bits"]))[0],
    "dtype": lambda value, _: getattr(torch, value["name"]),
}
