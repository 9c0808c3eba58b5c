"""What this machine is and what it is doing: recorded beside every measurement."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from fofa_deploy.results import Environment
from fofa_deploy.store import digest
from fofa_deploy.types import HardwareProfile

PACKAGES = ("fofa-deploy", "torch", "timm", "onnx", "onnxruntime", "openvino", "nncf", "tensorrt", "tensorrt-rtx", "numpy")
KERNEL_FLAGS = (
    *("avx", "avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16", "amx_tile"),
    *("asimd", "asimddp", "asimdhp", "fphp", "i8mm", "bf16", "sve"),
)
"""CPU flags that decide which kernels a runtime picks, x86 and ARM."""


def cpu_flags() -> frozenset[str]:
    """The CPU's flags as /proc/cpuinfo spells them; empty where there is no such file."""
    return frozenset(_cpuinfo("flags").split()) | frozenset(_cpuinfo("Features").split())


def _cpuinfo(key: str) -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == key), "")


def _governor() -> str | None:
    path = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    return path.read_text().strip() if path.is_file() else None


def package_versions(names: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Versions of those packages that are installed."""
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def describe() -> Environment:
    """This machine now."""
    features = tuple(flag for flag in KERNEL_FLAGS if flag in cpu_flags())
    cpu = _cpuinfo("model name") or platform.processor() or platform.machine()
    cores = len(os.sched_getaffinity(0))
    system = f"{platform.system()} {platform.release()}"
    versions = package_versions()
    return Environment(
        machine=platform.machine(),
        cpu=cpu,
        cores=cores,
        features=features,
        governor=_governor(),
        load_average=os.getloadavg()[0],
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        os=system,
        python=platform.python_version(),
        versions=versions,
        fingerprint=digest([platform.machine(), cpu, cores, features, versions]),
    )


def mismatch(profile: HardwareProfile) -> str:
    """Why this machine is not the profile's device as far as its CPU tells; empty when it may be."""
    if profile.device.host:
        return f"the device is {profile.device.host}, not this machine"
    machine = platform.machine().lower().replace("amd64", "x86_64").replace("arm64", "aarch64")
    if profile.device.architecture not in ("any", machine):
        return f"needs an {profile.device.architecture} CPU, this is {machine}"
    missing = sorted(set(profile.device.features) - cpu_flags())
    return f"this CPU lacks {', '.join(missing)}" if missing else ""
