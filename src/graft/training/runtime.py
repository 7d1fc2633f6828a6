"""How the same numbers are computed on this machine: device, threads, allocator, the route of fp32 matrix products."""

from __future__ import annotations

import ctypes
import math
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch

try:
    import resource
except ImportError:  # Windows
    resource = None

from graft.config.experiment import RuntimeConfig
from graft.errors import ConfigError, ResourceError
from graft.training.matmul import (
    PROBE_SHAPE,
    SMALLEST_PROBED,
    MatmulProbe,
    Shape,
    probe_fp32_matmul,
    product_seconds,
    use_onednn_fp32,
)

GPU_PEAK_FLOPS: dict[str, dict[torch.dtype, float]] = {
    name: {torch.float32: fp32, torch.bfloat16: half, torch.float16: half}
    for name, fp32, half in (
        ("A100", 19.5e12, 312e12),
        ("H100 HBM3", 67e12, 989e12),
        ("H100 PCIe", 51e12, 756e12),
        ("H200", 67e12, 989e12),
        ("GH200", 67e12, 989e12),
        ("L4", 30.3e12, 121e12),
        ("L40S", 91.6e12, 362e12),
        ("RTX 3090", 35.6e12, 71e12),
        ("RTX 4090", 82.6e12, 165e12),
    )
}
"""Words of a GPU's name -> dense matrix-product FLOP/s by dtype, from its datasheet (fp32 without TF32)."""

OTHER_MODELS = {"laptop", "d", "mig", "nvl", "max", "super", "ti"}
"""Words that make a GPU another one than its first words say."""


@dataclass(frozen=True)
class RuntimeReport:
    """What `configure_runtime` decided, for ``env.json``.

    Args:
        device: where the model goes.
        device_name: the processor's name.
        threads: CPU threads of one operation.
        allocator: glibc's was tuned, was left alone, or is not there.
        fp32_matmul: the route of fp32 matrix products on a CPU; "device" when they run elsewhere.
        probe: the measurement behind ``runtime.fp32_matmul: auto``; None when nothing had to be measured.
        deterministic: PyTorch refuses operations whose results vary.
    """

    device: torch.device
    device_name: str
    threads: int
    allocator: Literal["tuned", "untouched", "not glibc"]
    fp32_matmul: Literal["default", "onednn", "device"]
    probe: MatmulProbe | None
    deterministic: bool

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        data = {**asdict(self), "device": str(self.device)}
        if self.probe is not None:
            data["probe"] |= {"shape": list(self.probe.shape), "speedup": self.probe.speedup}
        return data


def configure_runtime(config: RuntimeConfig, *, matmul_shape: Shape = PROBE_SHAPE) -> RuntimeReport:
    """Sets this process up for a run: call it before anything large is allocated.

    Args:
        config: ``runtime`` of the experiment.
        matmul_shape: a product typical of the run (positions per micro-batch, hidden size, inner size); what
            ``fp32_matmul: auto`` measures. Below `SMALLEST_PROBED` multiply-adds the default route stays.

    Raises:
        ConfigError: the device's name means nothing, or a switch does nothing on it.
        ResourceError: this machine or this PyTorch has no such device or no oneDNN.
    """
    allocator = tune_allocator() if config.tune_allocator else "untouched"
    device = resolve_device(config.device)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    if config.deterministic and device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it once, and varies without it
    _set_determinism(config.deterministic)
    route, probe = _route_fp32_matmul(config.fp32_matmul, device, matmul_shape)
    return RuntimeReport(
        device=device,
        device_name=torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        threads=torch.get_num_threads(),
        allocator=allocator,
        fp32_matmul=route,
        probe=probe,
        deterministic=config.deterministic,
    )


@contextmanager
def runtime_restored() -> Iterator[None]:
    """Puts threads, determinism and the route of fp32 products back at the end (the allocator keeps its settings)."""
    threads = torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    precision = torch.get_float32_matmul_precision()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        _set_determinism(deterministic, warn_only=warn_only)
        torch.set_float32_matmul_precision(precision)


def _set_determinism(enabled: bool, *, warn_only: bool = False) -> None:
    """Tells PyTorch only what is new to it: the call imports the compiler, which is slow."""
    before = (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled())
    if before != (enabled, warn_only):
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)


def resolve_device(name: str, *, where: str = "runtime.device") -> torch.device:
    """The device of a name: auto takes the first of cuda, mps, cpu that works.

    Args:
        name: auto, cpu, cuda, cuda:N or mps.
        where: what gave the name, for messages.

    Raises:
        ConfigError: no such kind of device.
        ResourceError: it is not here.
    """
    mps = torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    match = re.fullmatch(r"(cpu|mps|cuda)(?:(?<=cuda):(\d+))?", name)
    if match is None:
        raise ConfigError(f"'{name}' is no device", where=where, expected="auto, cpu, cuda, cuda:N or mps")
    kind, index = match.groups()
    if (kind == "cuda" and not torch.cuda.is_available()) or (kind == "mps" and not mps):
        raise ResourceError(f"this machine or this PyTorch has no {kind}", where=where, fix=f"set {where} to auto")
    if kind != "cuda":
        return torch.device(kind)
    number, count = int(index) if index else torch.cuda.current_device(), torch.cuda.device_count()
    if number >= count:
        raise ResourceError(f"there is no {name}", where=where, expected=f"cuda:0 to cuda:{count - 1}")
    return torch.device("cuda", number)


def tune_allocator() -> Literal["tuned", "not glibc"]:
    """Tells glibc's malloc to keep freed memory instead of giving every large block back to the system.

    A step frees and allocates the same large tensors over and over; each fresh mapping costs a page fault per 4 KiB.
    Sets M_MMAP_MAX 0 (no separate mappings), M_TRIM_THRESHOLD 2³¹-1 (never shrink) and M_TOP_PAD 64 MiB (grow in
    steps).
    """
    if sys.platform != "linux":
        return "not glibc"
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return "not glibc"
    m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4  # malloc.h
    settings = ((m_mmap_max, 0), (m_trim_threshold, 2**31 - 1), (m_top_pad, 64 * 2**20))
    accepted = [libc.mallopt(key, value) for key, value in settings]
    assert all(accepted), "glibc refused a documented malloc setting"
    return "tuned"


def _cpu_name() -> str:
    try:
        info = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        info = ""
    found = re.search(r"^model name\s*:\s*(.+)$", info, re.MULTILINE)
    return found[1] if found else "CPU"


def _route_fp32_matmul(
    wanted: Literal["auto", "default", "onednn"], device: torch.device, shape: Shape
) -> tuple[Literal["default", "onednn", "device"], MatmulProbe | None]:
    if device.type != "cpu":
        if wanted == "onednn":
            raise ConfigError(
                f"onednn does nothing on {device}", where="runtime.fp32_matmul", fix="set runtime.fp32_matmul: auto"
            )
        return "device", None
    available = torch.backends.mkldnn.is_available()
    if wanted == "onednn" and not available:
        raise ResourceError(
            "this PyTorch was built without oneDNN", where="runtime.fp32_matmul", fix="set runtime.fp32_matmul: auto"
        )
    probe = None
    if wanted == "auto" and available and math.prod(shape) >= SMALLEST_PROBED:
        probe = probe_fp32_matmul(shape)
    onednn = wanted == "onednn" or (probe is not None and probe.accepts_onednn)
    use_onednn_fp32(onednn)
    return "onednn" if onednn else "default", probe


def measure_peak_flops(dtype: torch.dtype) -> float:
    """FLOP/s of matrix products in ``dtype`` on this CPU: what a model's share (MFU) is a share of.

    Measured once per process for each dtype, number of threads and route of fp32 products: the best of many short
    products, so that a moment without other load is enough.
    """
    return _measured_peak(dtype, torch.get_num_threads(), torch.get_float32_matmul_precision())


@cache
def _measured_peak(dtype: torch.dtype, threads: int, route: str) -> float:
    del threads, route  # they tell measurements apart
    best = 0.0
    with torch.no_grad():
        for size, budget in ((512, 0.1), (1024, 0.2)):
            if best and 2 * size**3 / best > budget:
                break  # this dtype is so slow here that one larger product would take too long
            a_SS = torch.ones(size, size, dtype=dtype)
            deadline = time.perf_counter() + budget
            a_SS @ a_SS
            while True:
                best = max(best, 2 * size**3 / product_seconds(a_SS, a_SS))
                if time.perf_counter() > deadline:
                    break
    return best


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Matrix-product FLOP/s of ``device`` in ``dtype``: measured on a CPU, a datasheet's on a GPU, else None."""
    if device.type == "cpu":
        return measure_peak_flops(dtype)
    if device.type == "cuda":
        return gpu_peak_flops(torch.cuda.get_device_name(device), dtype)
    return None


def gpu_peak_flops(name: str, dtype: torch.dtype) -> float | None:
    """The datasheet's FLOP/s of a GPU by its name; None when it is not in `GPU_PEAK_FLOPS`."""
    words = set(re.findall(r"\w+", name.lower()))
    if words & OTHER_MODELS:
        return None
    for key, rates in GPU_PEAK_FLOPS.items():
        if set(key.lower().split()) <= words:
            return rates.get(dtype)
    return None


def memory_limit_bytes(device: torch.device | None = None) -> int | None:
    """Memory this process may use on ``device`` (default: the host); None when the system does not say.

    On the host it is the smallest of physical memory, the control groups' limits and RLIMIT_AS.
    """
    if device is not None and device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    limits = [*_physical_memory(), *_cgroup_limits(), *_address_space_limit()]
    return min(limits, default=None)


def _physical_memory() -> Iterator[int]:
    if {"SC_PAGE_SIZE", "SC_PHYS_PAGES"} <= getattr(os, "sysconf_names", {}).keys():
        yield os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _address_space_limit() -> Iterator[int]:
    if resource is None:
        return
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft != resource.RLIM_INFINITY:
        yield soft


def _cgroup_limits(membership: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> Iterator[int]:
    """Limits of the control groups this process is in, parents included (versions 1 and 2)."""
    try:
        lines = membership.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        base, file = (root / "memory", "memory.limit_in_bytes") if controllers else (root, "memory.max")
        path = base / group.lstrip("/")
        for folder in (path, *path.parents):
            if folder != base and base not in folder.parents:
                break
            try:
                text = (folder / file).read_text(encoding="utf-8").strip()
            except OSError:
                continue
            if text.isdecimal():  # "max" means no limit
                yield int(text)


def peak_memory_bytes(device: torch.device | None = None) -> int | None:
    """The most memory used so far: allocated by PyTorch on a GPU, resident in this process on the host (default).

    None when the system does not say.
    """
    if device is not None and device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
    except OSError:
        status = ""
    found = re.search(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)
    if found:  # getrusage's figure survives exec, so it may be the parent process's
        return int(found[1]) * 1024
    if resource is None:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
