"""Energy: read from real files in the kernel's layout, summed over blocks alone, and null with the reason where there is none."""

from __future__ import annotations

import os

import pytest

from fofa_deploy.runner import energy
from fofa_deploy.runner.energy import Meter


def write(folder, **files):
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_text(str(content))
    return folder


def test_no_counter_is_null_with_the_reason(tmp_path):
    meter = Meter(tmp_path)
    with meter.over(5):
        pass
    found = meter.found()
    assert found["energy_mj"] is None
    assert "no energy counter" in found["energy_reason"]


def test_rapl_counts_packages_over_the_blocks_alone_and_through_their_end(tmp_path):
    package = write(tmp_path / "powercap" / "intel-rapl:0", energy_uj=1_000_000, max_energy_range_uj=10_000_000)
    write(tmp_path / "powercap" / "intel-rapl:0:0", energy_uj=77)  # a part of the package, not another one
    meter = Meter(tmp_path)
    with meter.over(10):
        (package / "energy_uj").write_text("3000000")
    (package / "energy_uj").write_text("9000000")  # between blocks: not ours
    with meter.over(10):
        (package / "energy_uj").write_text("1000000")  # wrapped: 1 J to the end and 1 J more
    found = meter.found()
    assert found["energy_mj"] == pytest.approx(1e3 * (2 + 2) / 20)
    assert "package" in found["energy_reason"]


def test_what_counts_the_whole_platform_is_no_package(tmp_path):
    package = write(tmp_path / "powercap" / "intel-rapl:0", energy_uj=0, max_energy_range_uj=9, name="package-0\n")
    platform = write(tmp_path / "powercap" / "intel-rapl:1", energy_uj=0, max_energy_range_uj=9, name="psys\n")
    meter = Meter(tmp_path)
    with meter.over(1):
        (package / "energy_uj").write_text("2000000")
        (platform / "energy_uj").write_text("5000000")
    assert meter.found()["energy_mj"] == pytest.approx(2000)


def test_a_sensor_without_power_has_voltage_and_current(tmp_path, monkeypatch):
    """As the kernel's driver of Jetson's chip: millivolts and milliamperes."""
    write(tmp_path / "hwmon" / "hwmon0", name="ina3221\n", in1_input=5000, curr1_input=800)
    clock = iter([10.0, 12.0])
    monkeypatch.setattr(energy.time, "perf_counter", lambda: next(clock))
    meter = Meter(tmp_path)
    with meter.over(4):
        pass
    assert meter.found()["energy_mj"] == pytest.approx(1e3 * 4 * 2 / 4)


def test_a_board_sensor_is_power_over_time(tmp_path, monkeypatch):
    rail = write(tmp_path / "hwmon" / "hwmon0", name="ina3221\n", power1_input=4_000_000)
    write(tmp_path / "hwmon" / "hwmon1", name="coretemp\n", power1_input=1)
    clock = iter([10.0, 12.0])
    monkeypatch.setattr(energy.time, "perf_counter", lambda: next(clock))
    meter = Meter(tmp_path)
    with meter.over(4):
        (rail / "power1_input").write_text("6000000")
    assert meter.found()["energy_mj"] == pytest.approx(1e3 * 5 * 2 / 4)


def test_a_gpu_is_not_told_by_the_cpus_counter(tmp_path):
    """But by NVML, or else by the board's sensor, or not at all."""
    write(tmp_path / "powercap" / "intel-rapl:0", energy_uj=1, max_energy_range_uj=2)
    found = Meter(tmp_path, gpu=99).found()
    assert found["energy_mj"] is None
    assert "NVML" in found["energy_reason"]
    write(tmp_path / "hwmon" / "hwmon0", name="ina3221\n", power1_input=4_000_000)
    assert Meter(tmp_path, gpu=99).reason == ""


@pytest.mark.parametrize(("bound", "nvml"), [("cuda:1", True), ("CUDAExecutionProvider", True), ("CPU", False), ("GPU.0", False)])
def test_nvml_is_asked_about_cuda_devices_alone(monkeypatch, bound, nvml):
    asked = []
    monkeypatch.setattr(energy, "_nvml", lambda index: asked.append(index) or (None, "none"))
    Meter.beside(bound, "cuda:1")
    assert asked == ([1] if nvml else [])


@pytest.mark.skipif(os.getuid() == 0, reason="root reads every file")
def test_a_counter_for_root_alone_is_told(tmp_path):
    package = write(tmp_path / "powercap" / "intel-rapl:0", energy_uj=1)
    (package / "energy_uj").chmod(0)
    assert "not readable" in Meter(tmp_path).found()["energy_reason"]
