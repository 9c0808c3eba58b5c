"""What this machine is and what it is doing: recorded beside every measurement."""

from __future__ import annotations

import platform
from collections.abc import Collection, Mapping
from typing import Any

from fofa_deploy.results import Environment
from fofa_deploy.runner import machine
from fofa_deploy.runner.machine import package_versions
from fofa_deploy.store import digest
from fofa_deploy.types import HardwareProfile

PACKAGES = (
    *("fofa-deploy", "torch", "timm", "onnx", "onnxruntime", "onnxruntime-gpu", "openvino", "nncf"),
    *("tensorrt", "tensorrt-rtx", "numpy"),
)
KERNEL_FLAGS = (
    *("avx", "avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16", "amx_tile"),
    *("asimd", "asimddp", "asimdhp", "fphp", "i8mm", "bf16", "sve"),
)
"""CPU flags that decide which kernels a runtime picks, x86 and ARM."""

__all__ = ["cpu_mismatch", "describe", "environment_of", "mismatch", "package_versions"]


def describe() -> Environment:
    """This machine now."""
    return environment_of(machine.facts(), machine.package_versions(PACKAGES))


def environment_of(facts: Mapping[str, Any], versions: dict[str, str]) -> Environment:
    """The record of a machine's facts, as the runner tells them here or on a device."""
    features = tuple(flag for flag in KERNEL_FLAGS if flag in facts["flags"])
    decisive = [facts["machine"], facts["cpu"], facts["cores"], features, versions]
    told = {name: value for name, value in facts.items() if name != "flags"}
    return Environment(**told, features=features, versions=versions, fingerprint=digest(decisive))


def mismatch(profile: HardwareProfile) -> str:
    """Why this machine is not the profile's device as far as its CPU tells; empty when it may be."""
    if profile.device.host:
        return f"the device is {profile.device.host}, not this machine"
    return cpu_mismatch(profile, platform.machine(), machine.cpu_flags())


def cpu_mismatch(profile: HardwareProfile, architecture: str, flags: Collection[str]) -> str:
    """Why a CPU is not the profile's; empty when it may be."""
    here = architecture.lower().replace("amd64", "x86_64").replace("arm64", "aarch64")
    if profile.device.architecture not in ("any", here):
        return f"needs an {profile.device.architecture} CPU, this is {here}"
    missing = sorted(set(profile.device.features) - set(flags))
    return f"this CPU lacks {', '.join(missing)}" if missing else ""
