"""What is shipped: exactly the packages and their data, installable from the wheel and from the sdist alike."""

import configparser
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email.parser import BytesParser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE_ROOTS = {"fofa_deploy": ROOT, "fofa_exporters": ROOT / "exporters", "fofa_profiles": ROOT / "profiles"}
SHIPPED = (".py", ".toml", ".j2", "py.typed")


@pytest.fixture(scope="module")
def dist(tmp_path_factory) -> Path:
    """A wheel of this tree, and in ``sdist/`` an sdist and the wheel that was built from it."""
    out = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir"]
    for command in ([*build, out, "--wheel"], [*build, out / "sdist"]):
        done = subprocess.run([*map(str, command), str(ROOT)], capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    return out


def one(folder: Path, pattern: str) -> Path:
    (found,) = folder.glob(pattern)
    return found


@pytest.fixture(scope="module")
def wheel(dist) -> Path:
    return one(dist, "*.whl")


def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def read(wheel: Path, name: str) -> bytes:
    with zipfile.ZipFile(wheel) as archive:
        return archive.read(name)


def test_the_wheel_holds_the_packages_and_nothing_else(wheel):
    wanted = {
        path.relative_to(root).as_posix()
        for package, root in SOURCE_ROOTS.items()
        for path in (root / package).rglob("*")
        if path.is_file() and path.name.endswith(SHIPPED)
    }
    found = {name for name in names(wheel) if ".dist-info/" not in name}
    assert found == wanted


@pytest.mark.parametrize(
    "name",
    [
        "fofa_deploy/plans/demo.toml",
        "fofa_deploy/report/templates/report.html.j2",
        "fofa_deploy/py.typed",
        "fofa_exporters/py.typed",
        "fofa_profiles/raspberry-pi-5.toml",
    ],
)
def test_data_is_shipped(wheel, name):
    assert name in names(wheel)


def test_the_top_level_has_three_packages_of_our_own_name(wheel):
    top = {name.partition("/")[0] for name in names(wheel) if ".dist-info/" not in name}
    assert top == SOURCE_ROOTS.keys()


def test_entry_points_are_those_of_the_project_file(wheel):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    parser = configparser.ConfigParser()
    parser.read_string(read(wheel, "fofa_deploy-0.1.0.dist-info/entry_points.txt").decode())
    assert dict(parser["console_scripts"]) == project["scripts"] == {"fofa-deploy": "fofa_deploy.cli:main"}
    assert dict(parser["fofa_deploy.backends"]) == project["entry-points"]["fofa_deploy.backends"]
    for target in project["entry-points"]["fofa_deploy.backends"].values():
        assert f"{target.partition(':')[0].replace('.', '/')}.py" in names(wheel)


def test_the_metadata_says_what_a_registry_needs(wheel):
    metadata = BytesParser().parsebytes(read(wheel, "fofa_deploy-0.1.0.dist-info/METADATA"))
    assert (metadata["Name"], metadata["Version"], metadata["Requires-Python"]) == ("fofa-deploy", "0.1.0", ">=3.11")
    assert metadata["License-Expression"] == "Apache-2.0"
    assert set(metadata.get_all("Provides-Extra")) == {"onnxruntime-gpu", "tensorrt", "tensorrt-rtx", "test", "bench", "dev"}
    required = {line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line}
    assert {"torch>=2.10", "onnxruntime>=1.23", "openvino>=2025.3", "timm>=1.0.20"} <= required
    assert not any("tensorrt" in line or "onnxruntime-gpu" in line for line in required)
    assert "Tag: py3-none-any" in read(wheel, "fofa_deploy-0.1.0.dist-info/WHEEL").decode()
    assert "fofa_deploy-0.1.0.dist-info/licenses/LICENSE" in names(wheel)


def test_the_sdist_builds_the_same_wheel(dist, wheel):
    assert names(one(dist / "sdist", "*.whl")) == names(wheel)


def test_the_sdist_can_be_tested_and_holds_no_litter(dist):
    with tarfile.open(one(dist / "sdist", "*.tar.gz")) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "LICENSE", "README.md", "Makefile", "tests/test_packaging.py"} <= inside
    assert {"exporters/fofa_exporters/reference.py", "profiles/fofa_profiles/reference.toml"} <= inside
    assert not [name for name in inside if "__pycache__" in name or name.startswith((".git/", ".venv", "runs/"))]


def test_an_unpacked_wheel_finds_its_own_data(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "import fofa_deploy.config as c, fofa_deploy.profile as p, fofa_deploy.backend as b\n"
        "print(c.__file__, c.load_plan('demo').name, len(p.installed_profiles()), b.backend_names())"
    )
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, timeout=60, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(tmp_path))
    assert "demo" in done.stdout
    assert "'reference'" in done.stdout
