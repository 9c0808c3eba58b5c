"""Energy, where the platform counts it, else the reason why there is no figure."""

from __future__ import annotations

import importlib
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fofa_deploy.runner.machine import ordinal


class Meter:
    """Energy of the blocks it is held over: RAPL counters, else INA power sensors, else the reason why there is none.

    With the number of a CUDA device, that of the GPU by NVML, else of the board it is soldered to; never the CPU's alone.
    """

    def __init__(self, sys_class: Path = Path("/sys/class"), gpu: int | None = None) -> None:
        self._joules, self._runs = 0.0, 0
        self._joules_by_nvml, self.reason = (None, "") if gpu is None else _nvml(gpu)
        self._counters: list[Path] = []
        self._sensors: list[Path] = []  # of one rail: its power, or its voltage and current
        if gpu is None:
            self._find_counters(sys_class)
        elif self.reason:
            self._sensors = _power_sensors(sys_class)
            self.reason = self._unreadable() if self._sensors else self.reason

    @classmethod
    def beside(cls, bound: str, name: str) -> Meter:
        """For a session on the device that its runtime calls ``bound``, and whose user asked for ``name``."""
        return cls(gpu=ordinal(name) if bound.lower().startswith("cuda") else None)

    def _find_counters(self, sys_class: Path) -> None:
        self._counters = sorted(sys_class.glob("powercap/intel-rapl:[0-9]*/energy_uj"))
        self._counters = [path for path in self._counters if path.parent.name.count(":") == 1 and _is_package(path.parent)]
        self._sensors = [] if self._counters else _power_sensors(sys_class)
        self.reason = self._unreadable()

    def _unreadable(self) -> str:
        if not self._counters and not self._sensors:
            return "this platform shows no energy counter: neither RAPL in /sys/class/powercap nor an INA sensor in hwmon"
        locked = [path for path in self._counters or self._sensors if not os.access(path, os.R_OK)]
        return f"{locked[0]} is not readable by this user" if locked else ""

    def _read(self) -> float:
        """Joules so far, or watts now."""
        if self._joules_by_nvml:
            return self._joules_by_nvml()
        if self._sensors:
            return math.prod(int(path.read_text()) for path in self._sensors) / 1e6
        return sum(int(path.read_text()) for path in self._counters) / 1e6

    @contextmanager
    def over(self, runs: int) -> Iterator[None]:
        """Count what a block of runs takes."""
        if self.reason:
            yield
            return
        before, since = self._read(), time.perf_counter()
        yield
        self._joules += self._used(before, self._read(), time.perf_counter() - since)
        self._runs += runs

    def _used(self, before: float, after: float, seconds: float) -> float:
        if self._sensors:
            return (before + after) / 2 * seconds
        return after - before if after >= before or not self._counters else after - before + self._range()

    def _range(self) -> float:
        """Where a counter starts again at nothing."""
        return int(self._counters[0].with_name("max_energy_range_uj").read_text()) / 1e6

    def found(self) -> dict[str, Any]:
        """``energy_mj`` per run, of the whole package or board, idle power included; None with ``energy_reason``."""
        if self.reason:
            return {"energy_mj": None, "energy_reason": self.reason}
        of = "board's power rails, sampled" if self._sensors else "CPU package by RAPL" if self._counters else "GPU by NVML"
        return {"energy_mj": 1e3 * self._joules / self._runs, "energy_reason": f"of the whole {of}, idle power included"}


def _nvml(index: int) -> tuple[Callable[[], float] | None, str]:
    """Joules that a CUDA device has used so far, or why they are not known."""
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError:
        return None, "a GPU's energy is told by NVML: install nvidia-ml-py"
    try:
        nvml.nvmlInit()
        several = nvml.nvmlDeviceGetCount() > 1
        if os.environ.get("CUDA_VISIBLE_DEVICES") or (several and os.environ.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID"):
            return None, "CUDA and NVML number the GPUs differently: set CUDA_DEVICE_ORDER=PCI_BUS_ID, and no CUDA_VISIBLE_DEVICES"
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        nvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except nvml.NVMLError as error:
        return None, f"NVML tells no energy: {error}"
    return lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3, ""


def _is_package(zone: Path) -> bool:
    """A zone beside the packages, psys, counts the whole platform, and them again."""
    name = zone / "name"
    return not name.is_file() or name.read_text().startswith("package")


def _power_sensors(sys_class: Path) -> list[Path]:
    """An INA sensor's first rail, the board's input on Jetson and most carriers: microwatts, or millivolts and milliamperes."""
    chips = [path.parent for path in sorted(sys_class.glob("hwmon/hwmon*/name")) if path.read_text().startswith("ina")]
    rails = [[chip / name for name in names] for chip in chips for names in (("power1_input",), ("in1_input", "curr1_input"))]
    return next((rail for rail in rails if all(path.is_file() for path in rail)), [])
