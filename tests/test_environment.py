"""What a machine says of itself, and whether it is the device that a profile means."""

import platform

import pytest

from fofa_deploy import environment
from fofa_deploy.profile import find_profile
from fofa_deploy.runner import machine


def device(**facts):
    profile = find_profile("cpu-onnxruntime")
    return profile.model_copy(update={"device": profile.device.model_copy(update=facts)})


def test_the_machine_is_described():
    found = environment.describe()
    assert found.machine == platform.machine()
    assert found.cores >= 1
    assert found.memory_bytes > 1 << 26
    assert found.python == platform.python_version()
    assert {"fofa-deploy", "torch", "onnx", "onnxruntime", "openvino", "numpy"} <= found.versions.keys()


def test_the_fingerprint_does_not_move_with_the_load(monkeypatch):
    before = environment.describe()
    monkeypatch.setattr("os.getloadavg", lambda: (99.0, 99.0, 99.0))
    after = environment.describe()
    assert after.load_average == 99.0
    assert after.fingerprint == before.fingerprint


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("package_versions", lambda names: {"onnxruntime": "0"}),
        ("cpu_flags", lambda: frozenset({"avx512_vnni"})),
        ("_cpuinfo", lambda key: "another CPU" if key == "model name" else ""),
    ],
)
def test_the_fingerprint_moves_with_what_decides_a_kernel(monkeypatch, name, change):
    before = environment.describe().fingerprint
    monkeypatch.setattr(machine, name, change)
    assert environment.describe().fingerprint != before


def test_packages_that_are_not_installed_are_left_out():
    assert environment.package_versions(("numpy", "no-such-package")).keys() == {"numpy"}


def test_this_machine_is_any_cpu():
    assert environment.mismatch(device()) == ""


def test_another_machine_says_why():
    other = "aarch64" if platform.machine() == "x86_64" else "x86_64"
    assert environment.mismatch(device(architecture=other)).startswith(f"needs an {other} CPU")
    assert environment.mismatch(device(features=("no_such_flag", "nor_this"))) == "this CPU lacks no_such_flag, nor_this"
    assert environment.mismatch(device(host="me@board")) == "the device is me@board, not this machine"


@pytest.mark.skipif(platform.system() != "Linux", reason="only Linux lists its CPU's flags in /proc/cpuinfo")
def test_a_flag_that_is_there_is_no_mismatch():
    flags = machine.cpu_flags()
    assert flags
    assert environment.mismatch(device(features=tuple(sorted(flags)[:3]))) == ""
