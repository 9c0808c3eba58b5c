"""What a machine is and what it is doing: recorded beside every measurement."""

from __future__ import annotations

import os
import platform
import resource
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt", "tensorrt-rtx", "numpy")


def cpu_flags() -> frozenset[str]:
    """The CPU's flags as /proc/cpuinfo spells them; empty where there is no such file."""
    return frozenset(_cpuinfo("flags").split()) | frozenset(_cpuinfo("Features").split())


def _cpuinfo(key: str) -> str:
    lines = (_text("/proc/cpuinfo") or "").splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == key), "")


def _text(path: str) -> str | None:
    """Of a file in /proc or /sys; some drivers answer a read with an error."""
    try:
        return Path(path).read_text().strip("\0\n ")
    except (OSError, UnicodeDecodeError):
        return None


def package_versions(names: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Versions of those packages that are installed."""
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _hottest() -> float | None:
    found = [_text(str(path)) for path in Path("/sys/class/thermal").glob("thermal_zone*/temp")]
    return max((int(value) / 1e3 for value in found if value and value.lstrip("-").isdigit()), default=None)


def _clock() -> float | None:
    """MHz of the first core now."""
    khz = _text("/sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq")
    mhz = _cpuinfo("cpu MHz")
    return int(khz) / 1e3 if khz and khz.isdigit() else float(mhz) if mhz else None


def _power_mode() -> str | None:
    """Jetson's nvpmodel, else the firmware's platform profile."""
    if shutil.which("nvpmodel") is None:
        return _text("/sys/firmware/acpi/platform_profile")
    try:
        asked = subprocess.run(["nvpmodel", "-q"], capture_output=True, text=True, timeout=20, check=False)
    except subprocess.TimeoutExpired:
        return None
    return " ".join(asked.stdout.split()) or None


def ordinal(name: str) -> int:
    """``cuda:1`` -> 1; a name without a number is device 0."""
    digits = name.rpartition(":")[2]
    return int(digits) if digits.isdigit() else 0


def peak_rss_bytes() -> int:
    """High-water mark of this process' resident memory.

    From VmHWM where there is one: ru_maxrss survives exec, and would tell the parent's peak.
    """
    status = _text("/proc/self/status")
    if status is not None:
        return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def facts() -> dict[str, Any]:
    """This machine now; versions apart."""
    affinity = sorted(os.sched_getaffinity(0))
    return {
        "machine": platform.machine(),
        "cpu": _cpuinfo("model name") or _text("/proc/device-tree/model") or platform.processor() or platform.machine(),
        "cores": len(affinity),
        "affinity": affinity,
        "flags": sorted(cpu_flags()),
        "governor": _text("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "clock_mhz": _clock(),
        "temperature_c": _hottest(),
        "power_mode": _power_mode(),
        "load_average": os.getloadavg()[0],
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "os": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }
