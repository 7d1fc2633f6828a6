"""Independent implementations, installed by ``make install`` from tests/oracles.txt without their dependencies.

What they import but never call here is replaced by stand-ins while they are imported. A missing one is an error, which
fails its tests.
"""

from __future__ import annotations

import importlib
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn


@cache
def retnet() -> ModuleType:
    """torchscale's decoder of retention layers; fairscale and timm are for sharding and for dropped paths."""
    folder_of("torchscale")
    layers, sharding = stand_in(drop_path=never), stand_in(checkpoint_wrapper=never, wrap=never)
    with modules({"timm.models.layers": layers, "fairscale.nn": sharding}):
        return importlib.import_module("torchscale.architecture.retnet")


@cache
def fla(name: str) -> ModuleType:
    """flash-linear-attention's plain form ``fla/ops/<name>/naive.py``, in double precision.

    Loaded by path, since importing the package needs triton. The source casts all it is given to fp32; here its casts
    are to fp64, so that nothing but the rounding of fp64 is left to see.
    """
    path = folder_of("fla") / "ops" / name / "naive.py"
    source = path.read_text(encoding="utf-8").replace(".float()", ".double()")
    source = re.sub(r"torch\.float(32)?\b", "torch.float64", source)
    module = ModuleType(f"fla_{name}")
    with modules({"fla.ops.titans.log_impl": stand_in(combine_params_log=never)}):
        exec(compile(source, str(path), "exec"), vars(module))
    return module


class Tensors(dict[str, Tensor]):
    """What titans-pytorch uses of tensordict's TensorDict."""

    def apply(self, function: Callable[[Tensor], Tensor]) -> Tensors:
        return Tensors({name: function(tensor) for name, tensor in self.items()})

    def clone(self) -> Tensors:
        return self.apply(torch.clone)

    def zero_(self) -> Tensors:
        return self.apply(torch.zero_)

    def mul(self, factor: float) -> Tensors:
        return self.apply(lambda tensor: tensor * factor)


@cache
def neural_memory() -> ModuleType:
    """titans-pytorch's memory; tensordict is compiled, and the package's other modules import more still."""
    package = stand_in()
    package.__path__ = [str(folder_of("titans_pytorch"))]
    with modules({"titans_pytorch": package, "tensordict": stand_in(TensorDict=Tensors)}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`torch.jit.script` is deprecated", category=DeprecationWarning)
        return importlib.import_module("titans_pytorch.neural_memory")


@cache
def peer() -> type[nn.Module]:
    """PEER-pytorch's layer."""
    folder_of("PEER_pytorch")
    return importlib.import_module("PEER_pytorch.PEER").PEER


@cache
def product_key_memory() -> type[nn.Module]:
    """product-key-memory's layer; colt5_attention is for its differentiable top-k."""
    folder_of("product_key_memory")
    with modules({"colt5_attention": stand_in(topk=never)}):
        return importlib.import_module("product_key_memory.product_key_memory").PKM


def folder_of(package: str) -> Path:
    """Where a package lies, without importing it."""
    spec = find_spec(package)
    if spec is None or spec.submodule_search_locations is None:
        raise ModuleNotFoundError(f"{package} is missing; `make install` installs it (tests/oracles.txt)")
    return Path(next(iter(spec.submodule_search_locations)))


@contextmanager
def modules(stand_ins: Mapping[str, ModuleType]) -> Iterator[None]:
    """What imports of these names find for a while, whether or not the real ones are installed."""
    before = {name: sys.modules.get(name) for name in stand_ins}
    sys.modules.update(stand_ins)
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


def stand_in(**contents: Any) -> ModuleType:
    module = ModuleType("stand_in")
    vars(module).update(contents)
    return module


def never(*_: Any, **__: Any) -> Any:
    raise AssertionError("a stand-in was called")
