"""What a profile's device tells a back end: which int8 instructions its CPU has, which GPU is meant."""

from __future__ import annotations

import platform
from enum import Enum
from pathlib import Path

from fofa_deploy.types import HardwareProfile

VNNI = frozenset({"avx512_vnni", "avx_vnni"})
ARM = frozenset({"aarch64", "arm64"})


class Products(Enum):
    """How pairs of u8 x s8 products are added."""

    EXACT = "32 bits: VNNI, and every Arm CPU"
    SATURATING = "16 bits that saturate: x86 without VNNI"
    UNKNOWN = "a remote device whose profile names no CPU flags"


def products(profile: HardwareProfile) -> Products:
    """From the profile's flags; where it names none and means this machine, from this machine's."""
    here = profile.device.host is None
    machine = platform.machine() if here and profile.device.architecture == "any" else profile.device.architecture
    if machine in ARM:
        return Products.EXACT
    flags = set(profile.device.features) or (_local_flags() if here else set())
    if not flags:
        return Products.UNKNOWN
    return Products.EXACT if VNNI & flags else Products.SATURATING


def _local_flags() -> set[str]:
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return next((set(line.partition(":")[2].split()) for line in lines if line.startswith("flags")), set())


def ordinal(name: str) -> int:
    """``cuda:1``, ``GPU.1`` -> 1; a name without a number is device 0."""
    digits = name.rpartition(".")[2].rpartition(":")[2]
    return int(digits) if digits.isdigit() else 0
