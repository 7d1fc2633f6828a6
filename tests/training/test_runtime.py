"""Switches that change how, never what, is computed; and what the machine has."""

import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import graft.training.matmul as matmul_module
import graft.training.runtime as runtime_module
from graft.config.experiment import RuntimeConfig
from graft.errors import ConfigError, ResourceError
from graft.training.matmul import SMALLEST_PROBED, MatmulProbe
from graft.training.runtime import (
    _cgroup_limits,
    configure_runtime,
    gpu_peak_flops,
    measure_peak_flops,
    memory_limit_bytes,
    peak_flops,
    peak_memory_bytes,
    resolve_device,
    runtime_restored,
)

CPU = torch.device("cpu")
LARGE = (256, 256, 256)
NO_GPU = pytest.mark.skipif(
    torch.cuda.is_available() or torch.backends.mps.is_available(), reason="this machine has a GPU"
)


@pytest.fixture(autouse=True)
def _process_restored():
    with runtime_restored():
        yield


def config(**fields) -> RuntimeConfig:
    return RuntimeConfig.model_validate({"device": "cpu", "tune_allocator": False, "fp32_matmul": "default", **fields})


def probe_of(speedup: float, error: float):
    return lambda shape: MatmulProbe(shape, speedup, 1.0, error)


def test_threads():
    torch.set_num_threads(1)
    assert configure_runtime(config()).threads == 1
    assert configure_runtime(config(threads=2)).threads == torch.get_num_threads() == 2


def test_determinism_is_set_both_ways():
    assert configure_runtime(config(deterministic=True)).deterministic
    assert torch.are_deterministic_algorithms_enabled()
    assert not configure_runtime(config()).deterministic
    assert not torch.are_deterministic_algorithms_enabled()


def test_everything_is_put_back():
    torch.set_num_threads(1)
    with runtime_restored():
        configure_runtime(config(threads=2, deterministic=True, fp32_matmul="onednn"))
        assert torch.get_float32_matmul_precision() == "medium"
    assert torch.get_num_threads() == 1
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize(
    ("speedup", "error", "route"),
    [(2.0, 1e-6, "onednn"), (2.0, 3e-3, "default"), (1.0, 1e-6, "default"), (0.5, 1e-6, "default")],
)
def test_auto_follows_the_probe(monkeypatch: pytest.MonkeyPatch, speedup: float, error: float, route: str):
    monkeypatch.setattr(runtime_module, "probe_fp32_matmul", probe_of(speedup, error))
    report = configure_runtime(config(fp32_matmul="auto"), matmul_shape=LARGE)
    assert report.fp32_matmul == route
    assert torch.get_float32_matmul_precision() == {"onednn": "medium", "default": "highest"}[route]
    probe = report.to_dict()["probe"]
    assert (probe["speedup"], probe["onednn_error"], probe["shape"]) == (speedup, error, list(LARGE))


def test_auto_leaves_tiny_products_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(runtime_module, "probe_fp32_matmul", probe_of(2.0, 0.0))
    torch.set_float32_matmul_precision("medium")
    report = configure_runtime(config(fp32_matmul="auto"), matmul_shape=(SMALLEST_PROBED - 1, 1, 1))
    assert (report.fp32_matmul, report.probe) == ("default", None)
    assert torch.get_float32_matmul_precision() == "highest"
    assert configure_runtime(config(fp32_matmul="auto"), matmul_shape=(SMALLEST_PROBED, 1, 1)).probe is not None


@pytest.mark.parametrize("route", ["default", "onednn"])
def test_forced_routes_measure_nothing(monkeypatch: pytest.MonkeyPatch, route: str):
    monkeypatch.setattr(runtime_module, "probe_fp32_matmul", lambda shape: pytest.fail("probed"))
    report = configure_runtime(config(fp32_matmul=route), matmul_shape=LARGE)
    assert (report.fp32_matmul, report.probe, report.to_dict()["probe"]) == (route, None, None)


def test_the_accepted_route_computes_fp32():
    """Whatever `auto` decides here, products of the run's own shape stay within fp32's rounding."""
    configure_runtime(config(fp32_matmul="auto"))
    generator = torch.Generator().manual_seed(1)
    x, w = torch.randn(300, 512, generator=generator), torch.randn(512, 200, generator=generator)
    assert matmul_module.relative_error(x @ w, x, w) < 2e-6


def test_without_onednn(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert configure_runtime(config(fp32_matmul="auto"), matmul_shape=LARGE).fp32_matmul == "default"
    with pytest.raises(ResourceError, match=r"runtime\.fp32_matmul.*without oneDNN"):
        configure_runtime(config(fp32_matmul="onednn"))


def test_other_devices_route_nothing():
    device = torch.device("cuda", 0)
    torch.set_float32_matmul_precision("high")  # a user's TF32 stays
    assert runtime_module._route_fp32_matmul("auto", device, LARGE) == ("device", None)
    assert runtime_module._route_fp32_matmul("default", device, LARGE) == ("device", None)
    assert torch.get_float32_matmul_precision() == "high"
    with pytest.raises(ConfigError, match="onednn does nothing on cuda:0"):
        runtime_module._route_fp32_matmul("onednn", device, LARGE)


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "cuda:-1", "cpu:0", "mps:1", ""])
def test_a_name_that_means_nothing(name: str):
    with pytest.raises(ConfigError, match=r"runtime\.device.*is no device.*auto, cpu, cuda"):
        resolve_device(name)


@NO_GPU
@pytest.mark.parametrize("name", ["cuda", "cuda:0", "mps"])
def test_a_device_that_is_not_here(name: str):
    with pytest.raises(ResourceError, match=f"has no {name.partition(':')[0]}"):
        resolve_device(name)


@NO_GPU
def test_auto_is_the_cpu_without_others():
    assert resolve_device("auto") == resolve_device("cpu") == CPU


def test_cuda_indices(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert [resolve_device(n) for n in ("auto", "cuda", "cuda:0")] == [torch.device("cuda", i) for i in (1, 1, 0)]
    with pytest.raises(ResourceError, match=r"no cuda:2.*cuda:0 to cuda:1"):
        resolve_device("cuda:2")


ALLOCATOR_SCRIPT = """
import resource
from graft.training.runtime import tune_allocator
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        block = bytearray(2**25)
        del block
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
untouched = faults()
assert tune_allocator() == "tuned"
faults()
print(untouched, faults())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
def test_the_tuned_allocator_keeps_its_pages():
    """Page faults of allocating and freeing 32 MiB twenty times, before and after, in a fresh process."""
    command = [sys.executable, "-c", ALLOCATOR_SCRIPT]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    untouched, tuned = map(int, output.split())
    assert untouched > 20 * 2**25 / 2**22  # even with huge pages, each round maps afresh
    assert tuned < untouched / 5


def test_the_allocator_switch(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(runtime_module, "tune_allocator", lambda: "tuned")
    assert configure_runtime(config(tune_allocator=True)).allocator == "tuned"
    assert configure_runtime(config(tune_allocator=False)).allocator == "untouched"


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
def test_another_libc_is_reported(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(runtime_module.ctypes, "CDLL", lambda name: object())
    assert runtime_module.tune_allocator() == "not glibc"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert runtime_module.tune_allocator() == "not glibc"


def test_the_report_is_plain_data():
    data = configure_runtime(config()).to_dict()
    assert data["device"] == "cpu"
    assert data["device_name"]
    assert data["allocator"] == "untouched"


def test_measured_peak_is_cached_and_close_to_what_a_product_reaches():
    rate = measure_peak_flops(torch.float32)
    assert measure_peak_flops(torch.float32) == rate == peak_flops(CPU, torch.float32)
    a = torch.ones(256, 256)
    best = min(matmul_module.product_seconds(a, a) for _ in range(200))
    assert 2 * 256**3 / best < 3 * rate  # the peak is not a figure that ordinary products exceed
    torch.set_num_threads(torch.get_num_threads() + 1)
    before = runtime_module._measured_peak.cache_info().misses
    measure_peak_flops(torch.float32)
    assert runtime_module._measured_peak.cache_info().misses == before + 1


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA L40", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("Some GPU", None),
    ],
)
def test_gpu_names(name: str, expected: float | None):
    assert gpu_peak_flops(name, torch.bfloat16) == expected
    assert gpu_peak_flops(name, torch.int8) is None
    fp32 = gpu_peak_flops(name, torch.float32)
    assert (fp32 is None) == (expected is None)
    assert fp32 is None or expected is None or fp32 < expected


def test_cgroup_limits_version_2(tmp_path: Path):
    membership = tmp_path / "cgroup"
    membership.write_text("0::/a/b\n")
    root = tmp_path / "fs"
    (root / "a" / "b").mkdir(parents=True)
    (root / "a" / "b" / "memory.max").write_text("max\n")
    assert list(_cgroup_limits(membership, root)) == []
    (root / "a" / "memory.max").write_text("1000\n")
    (tmp_path / "memory.max").write_text("1\n")  # above the root: none of ours
    (root / "memory.max").write_text("5000\n")
    assert sorted(_cgroup_limits(membership, root)) == [1000, 5000]


def test_cgroup_limits_version_1(tmp_path: Path):
    membership = tmp_path / "cgroup"
    membership.write_text("4:cpu,cpuacct:/x\n3:memory:/x\n")
    group = tmp_path / "fs" / "memory" / "x"
    group.mkdir(parents=True)
    (group / "memory.limit_in_bytes").write_text("2000\n")
    (tmp_path / "fs" / "memory.max").write_text("7\n")
    assert list(_cgroup_limits(membership, tmp_path / "fs")) == [2000]
    assert list(_cgroup_limits(tmp_path / "absent", tmp_path)) == []


def test_memory_limit_is_the_smallest(monkeypatch: pytest.MonkeyPatch):
    physical = next(iter(runtime_module._physical_memory()))
    assert memory_limit_bytes() is not None
    assert memory_limit_bytes(CPU) <= physical
    monkeypatch.setattr(runtime_module, "_cgroup_limits", lambda: iter([12345]))
    assert memory_limit_bytes() == 12345
    monkeypatch.setattr(runtime_module, "_address_space_limit", lambda: iter([1234]))
    assert memory_limit_bytes() == 1234


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS is Linux's")
def test_the_address_space_limit_is_read(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (777, -1) if kind == resource.RLIMIT_AS else (0, 0))
    assert list(runtime_module._address_space_limit()) == [777]
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (resource.RLIM_INFINITY, -1))
    assert list(runtime_module._address_space_limit()) == []


def test_a_system_without_resource_limits(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(runtime_module, "resource", None)
    assert list(runtime_module._address_space_limit()) == []
    monkeypatch.setattr(Path, "read_text", lambda *a, **k: "")
    assert peak_memory_bytes() is None


GROWING = """
from graft.training.runtime import peak_memory_bytes
before = peak_memory_bytes()
block = bytearray(b"x") * (2**28)
grown = peak_memory_bytes()
del block
print(before, grown, peak_memory_bytes())
"""


def test_peak_memory_grows_with_what_is_touched_and_stays(monkeypatch: pytest.MonkeyPatch):
    """In a process of its own: this one may have freed memory at hand."""
    done = subprocess.run([sys.executable, "-c", GROWING], capture_output=True, text=True, check=True)
    before, grown, after = map(int, done.stdout.split())
    assert grown >= before + 2**28 - 2**26
    assert after >= grown - 2**21  # the kernel counts pages in batches
    monkeypatch.setattr(Path, "read_text", lambda *a, **k: "")
    assert peak_memory_bytes() > 2**20  # from getrusage where there is no /proc
