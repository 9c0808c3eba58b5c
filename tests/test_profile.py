"""Profiles: every installed one is sound, names and paths do not mix, and the README's field table is the model's."""

import re
from pathlib import Path

import pytest
from pydantic import BaseModel
from pydantic_core import to_json

from fofa_deploy.backend import backend_names
from fofa_deploy.errors import PlanError
from fofa_deploy.profile import find_profile, installed_profiles
from fofa_deploy.types import HardwareProfile

README = Path(__file__).parents[1] / "profiles" / "README.md"
WANTED = {
    "cpu-onnxruntime",
    "cpu-openvino",
    "x86-onnxruntime",
    "x86-vnni-onnxruntime",
    "raspberry-pi-5",
    "intel-cpu-openvino",
    "intel-igpu-openvino",
    "intel-npu-openvino",
    "jetson-orin",
    "rtx-desktop",
    "datacenter-gpu",
    "reference",
}
BOARD = 'name = "my-board"\ndescription = "d"\nruntime = "onnxruntime"\nprecisions = ["fp32"]\n'


def test_every_wanted_profile_is_installed():
    assert {profile.name for profile in installed_profiles()} >= WANTED


@pytest.mark.parametrize("profile", installed_profiles(), ids=lambda profile: profile.name)
def test_an_installed_profile_is_sound(profile):
    assert profile.runtime in backend_names()
    assert find_profile(profile.name) == profile  # so the file is called what the profile is called
    assert profile.device.host is None


def test_what_the_names_promise():
    assert find_profile("x86-vnni-onnxruntime").device.features == ("avx512_vnni",)
    assert find_profile("raspberry-pi-5").execution.threads == 4
    assert find_profile("raspberry-pi-5").device.architecture == "aarch64"
    assert find_profile("intel-igpu-openvino").device.name == "GPU"
    assert find_profile("rtx-desktop").runtime == "tensorrt-rtx"
    assert find_profile("reference").precisions == ("fp32",)


def test_a_path_is_read(tmp_path, monkeypatch):
    (tmp_path / "board ä.toml").write_text(BOARD)
    (tmp_path / "bare.toml").write_text(BOARD)
    monkeypatch.chdir(tmp_path)
    assert find_profile(str(tmp_path / "board ä.toml")).name == "my-board"
    assert find_profile("bare.toml").name == "my-board"


def test_a_bare_name_is_never_a_file_here(tmp_path, monkeypatch):
    (tmp_path / "bare.toml").write_text(BOARD)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PlanError, match=re.escape("write ./bare.toml")):
        find_profile("bare")


@pytest.mark.parametrize("name", ["", ".", "..", "../fofa_profiles/reference", "/reference", "\0.toml", "x" * 5000 + ".toml"])
def test_odd_names_are_refused(name):
    with pytest.raises(PlanError):
        find_profile(name)


def test_the_nearest_name_is_named():
    with pytest.raises(PlanError, match="raspberry-pi-5"):
        find_profile("raspbery_pi_5")
    with pytest.raises(PlanError, match="installed: cpu-onnxruntime"):
        find_profile("zzz")


def test_five_mistakes_are_named_at_once(tmp_path):
    path = tmp_path / "board.toml"
    path.write_text(
        'name = "My Board"\ndesciption = "d"\nruntime = "onnxruntime"\nprecisions = ["FP16", "int4"]\n'
        '[device]\narchitecture = "arm64"\n[execution]\nthread = 4\n[budget]\np90_ms = -1\n'
    )
    with pytest.raises(PlanError) as caught:
        find_profile(str(path))
    assert caught.value.message.splitlines()[0] == f"{path} has 7 mistakes:"
    for words in (
        'name: "My Board" does not match',
        "desciption: unknown key; did you mean 'description'?",
        'precisions[0]: unknown value "FP16"; did you mean "fp16"?',
        'precisions[1]: unknown value "int4"; did you mean "int8"?',
        'device.architecture: unknown value "arm64"',
        "execution.thread: unknown key; did you mean 'threads'?",
        "budget.p90_ms: must be greater than 0, got -1",
    ):
        assert words in caught.value.message


def leaves(model: type[BaseModel], prefix: str = "") -> dict[str, str]:
    """Dotted name of every field -> its default as the README writes it."""
    found = {}
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found |= leaves(field.annotation, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = "required" if field.is_required() else written(field.default)
    return found


def written(default) -> str:
    return "none" if default is None else f"`{to_json(default).decode()}`"


def test_the_readme_describes_every_field_and_no_other():
    section = README.read_text().partition("## Fields")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `([a-z0-9_.]+)` \| ([^|]+) \| ([^|]+) \| ([^|]+) \|$", section, flags=re.MULTILINE)
    assert {name: default.strip() for name, _, default, _ in rows} == leaves(HardwareProfile)


def test_the_readme_lists_every_installed_profile_with_its_runtime():
    section = README.read_text().partition("## Installed profiles")[2]
    rows = re.findall(r"^\| `([^`]+)` \| (\S+) \|", section, flags=re.MULTILINE)
    assert dict(rows) == {profile.name: profile.runtime for profile in installed_profiles()}


def test_the_readme_example_is_a_profile(tmp_path):
    example = README.read_text().partition("```toml\n")[2].partition("```")[0]
    (tmp_path / "example.toml").write_text(example)
    assert find_profile(str(tmp_path / "example.toml")).budget.p90_ms == 40.0
