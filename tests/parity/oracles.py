"""Independent implementations, which ``make install`` puts into a folder of their own (tests/oracles.txt says why).

They are imported with that folder on the path, and with stand-ins for what they import but never call here. A missing
one is an error, which fails its tests.
"""

from __future__ import annotations

import importlib
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

FOLDER = Path(sys.prefix) / "oracles"


@cache
def torchscale(name: str) -> ModuleType:
    """The module ``torchscale.<name>``; fairscale and timm are for sharding and for dropped paths."""
    layers, sharding = stand_in(drop_path=never), stand_in(checkpoint_wrapper=never, wrap=never)
    with importing({"timm.models.layers": layers, "fairscale.nn": sharding}):
        return importlib.import_module(f"torchscale.{name}")


@cache
def fla(name: str) -> ModuleType:
    """flash-linear-attention's plain form ``fla/ops/<name>/naive.py``, in double precision.

    The source casts all it is given to fp32; here its casts are to fp64, so that nothing but the rounding of fp64 is
    left to see.
    """
    return fla_file(f"ops/{name}/naive.py", {"fla.ops.titans.log_impl": stand_in(combine_params_log=never)})


def both_directions(naive: Callable[..., tuple[Tensor, Any]], *tensors: Tensor) -> Tensor:
    """What a plain form gives of [B, T, …] there, and back; what it gives of each position by itself is in both."""
    there, back = naive(*tensors)[0], naive(*(x.flip(1) for x in tensors))[0].flip(1)
    alone = naive(*(x.flatten(0, 1)[:, None] for x in tensors))[0].view_as(there)
    return there + back - alone


@cache
def fla_gla(*, bidirectional: bool = False) -> type[nn.Module]:
    """flash-linear-attention's layer around gated linear attention, over its plain form instead of triton's kernels.

    For one document without padding and without a cache. ``bidirectional`` has the plain form in both directions.
    """

    def recurrent(q: Tensor, k: Tensor, v: Tensor, gk: Tensor, **_: Any) -> tuple[Tensor, Any]:
        naive = fla("gla").naive_recurrent_gla
        return (both_directions(naive, q, k, v, gk), None) if bidirectional else naive(q, k, v, gk)

    def norm(hidden_size: int, elementwise_affine: bool, eps: float, dtype: torch.dtype) -> nn.Module:
        return nn.RMSNorm(hidden_size, eps, elementwise_affine, dtype=dtype)

    no_cache: dict[str, Any] = {"get_layer_cache": lambda *_: None, "update_layer_cache": lambda *_, **__: None}
    no_packing: dict[str, Any] = {
        "unpad_hidden_states": lambda x, *_: (x, None, None),
        "repad_hidden_states": lambda x, *_: x,
    }
    stand_ins = {
        "fla.layers.utils": stand_in(**no_cache, **no_packing),
        "fla.modules": stand_in(FusedRMSNormGated=never, RMSNorm=norm, ShortConvolution=never),
        "fla.modules.activations": stand_in(ACT2FN={"swish": nn.functional.silu}),
        "fla.ops.gla": stand_in(chunk_gla=never, fused_chunk_gla=never, fused_recurrent_gla=recurrent),
    }
    return fla_file("layers/gla.py", stand_ins).GatedLinearAttention


@cache
def ssd_minimal() -> Callable[..., tuple[Tensor, Tensor]]:
    """mamba-ssm's plain form of the scan, listing 1 of the Mamba-2 paper; the file's own check imports a kernel."""
    path = "mamba_ssm/modules/ssd_minimal.py"
    module = ModuleType(path)
    with importing({"mamba_ssm.ops.triton.ssd_combined": stand_in(mamba_chunk_scan_combined=never)}):
        exec(compile((FOLDER / path).read_text(encoding="utf-8"), path, "exec"), vars(module))
    return module.ssd_minimal_discrete


def fla_file(path: str, stand_ins: Mapping[str, ModuleType]) -> ModuleType:
    """A file of flash-linear-attention by itself, with fp64 for fp32: importing the package needs triton."""
    module = ModuleType(path)
    with importing(stand_ins):
        source = (FOLDER / "fla" / path).read_text(encoding="utf-8").replace(".float()", ".double()")
        source = re.sub(r"torch\.float(32)?\b", "torch.float64", source)
        exec(compile(source, path, "exec"), vars(module))
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
    package = stand_in(__path__=[str(FOLDER / "titans_pytorch")])
    with importing({"titans_pytorch": package, "tensordict": stand_in(TensorDict=Tensors)}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`torch.jit.script` is deprecated", category=DeprecationWarning)
        return importlib.import_module("titans_pytorch.neural_memory")


@cache
def peer() -> type[nn.Module]:
    """PEER-pytorch's layer."""
    with importing({}):
        return importlib.import_module("PEER_pytorch.PEER").PEER


@cache
def product_key_memory() -> type[nn.Module]:
    """product-key-memory's layer; colt5_attention is for its differentiable top-k."""
    with importing({"colt5_attention": stand_in(topk=never)}):
        return importlib.import_module("product_key_memory.product_key_memory").PKM


@cache
def x_transformers() -> ModuleType:
    """x-transformers, which is installed as any other; importing it warns about PyTorch features it still uses."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return importlib.import_module("x_transformers.x_transformers")


@contextmanager
def importing(stand_ins: Mapping[str, ModuleType]) -> Iterator[None]:
    """Imports find the folder last, and stand-ins under these names, whether or not the real ones are installed."""
    if not FOLDER.is_dir():
        raise ModuleNotFoundError(f"{FOLDER} is missing; `make install` fills it with tests/oracles.txt")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [*sys.path, str(FOLDER)])
        for name, module in stand_ins.items():
            patch.setitem(sys.modules, name, module)
        yield


def stand_in(**contents: Any) -> ModuleType:
    module = ModuleType("stand_in")
    vars(module).update(contents)
    return module


def never(*_: Any, **__: Any) -> Any:
    raise AssertionError("a stand-in was called")
