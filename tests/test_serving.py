"""serve.py, run as a user runs it, says of a photograph what this package says of it."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import build, write_graph

from fofa_deploy.backend import get_backend
from fofa_deploy.config import DataPlan
from fofa_deploy.data.decode import to_pixels
from fofa_deploy.profile import find_profile
from fofa_deploy.serving import ENGINE, NAME, PREPROCESS, example, write_example
from fofa_deploy.serving.preprocess import prepare
from fofa_deploy.types import Artifact, Precision, Preprocessing


def photograph(folder: Path) -> Path:
    file = folder / "a photo.png"
    Image.linear_gradient("L").rotate(30).resize((37, 29)).save(file)
    return file


def expected_pixels(photo: Path, known: Preprocessing) -> np.ndarray:
    """By the code that training reads its images with."""
    return known.apply(to_pixels(Image.open(photo), DataPlan(name="images", classes=3, **known.model_dump()))[None])


def serve(folder: Path, *photos: object, warnings: str = "error") -> subprocess.CompletedProcess[str]:
    """In a Python that does not see this package."""
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-W", warnings, NAME, *map(str, photos)]
    return subprocess.run(command, cwd=folder, env=clean, capture_output=True, text=True, timeout=120, check=False)


def with_example(profile_name: str, folder: Path) -> Artifact:
    artifact = Artifact.load(build(write_graph(folder / "graph"), profile_name, folder / "artifact"))
    write_example(artifact)
    return artifact


@pytest.mark.parametrize(
    ("kind", "words"), [("floats", "white"), ("large", "white"), ("negative", "white"), ("eps", "cannot identify")]
)
def test_what_training_refuses_is_refused(tmp_path, kind, words):
    """A class for what may be a white image or a black one would be none; PostScript would start another program."""
    numbers = {"floats": np.full((8, 8), 0.5, np.float32), "large": np.full((8, 8), 70_000), "negative": np.full((8, 8), -1)}
    image = (
        Image.new("RGB", (8, 8))
        if kind == "eps"
        else Image.fromarray(numbers[kind].astype("float32" if kind == "floats" else "int32"))
    )
    file = tmp_path / ("photo.eps" if kind == "eps" else "photo.tiff")
    image.save(file)
    known = Preprocessing(image_size=(8, 8), channels=3, mean=(0.5,) * 3, std=(0.5,) * 3).model_dump(mode="json")
    with pytest.raises((ValueError, OSError), match=words):
        prepare(file, {"preprocessing": known, "input": {"dtype": "float32"}})


@pytest.mark.parametrize("profile_name", ["cpu-onnxruntime", "cpu-openvino"])
def test_a_photograph_gets_the_same_class_and_score(profile_name, tmp_path):
    artifact, photo = with_example(profile_name, tmp_path), photograph(tmp_path)
    shown = serve(artifact.folder, photo, photo)
    assert shown.returncode == 0, shown.stderr
    pixels = expected_pixels(photo, artifact.sidecar.preprocessing)
    with get_backend(artifact.backend).load(artifact, find_profile(profile_name)) as session:
        logits = session.run({artifact.sidecar.input.name: pixels})[artifact.sidecar.output.name][0]
    first, second = shown.stdout.splitlines()
    assert first == second
    assert first.startswith(f"{photo} ")
    assert first.split()[-2] == artifact.sidecar.class_names[int(logits.argmax())]
    assert float(first.split()[-1]) == pytest.approx(float(logits.max()), rel=1e-4, abs=1e-4)
    assert Artifact.load(artifact.folder).sha256 == artifact.sha256


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("method", ["bilinear", "bicubic", "nearest"])
@pytest.mark.parametrize(("crop", "bits"), [(1.0, 8), (0.875, 8), (1.0, 16)])
def test_preprocessing_is_that_of_training(tmp_path, channels, method, crop, bits):
    values = {"mean": (0.4, 0.5, 0.6)[:channels], "std": (0.2, 0.25, 0.3)[:channels]}
    known = Preprocessing(image_size=(16, 24), channels=channels, interpolation=method, crop_fraction=crop, **values)
    file = tmp_path / "photo.png"
    shape, dtype = ((50, 41, 3), np.uint8) if bits == 8 else ((50, 41), np.uint16)
    Image.fromarray(np.random.default_rng(0).integers(0, 2**bits, shape, dtype)).save(file)
    found = prepare(file, {"input": {"dtype": "float32"}, "preprocessing": known.model_dump(mode="json")})
    assert (found.shape, found.dtype) == ((1, channels, 16, 24), np.float32)
    np.testing.assert_allclose(found, expected_pixels(file, known), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("profile_name", ["cpu-onnxruntime", "cpu-openvino", "rtx-desktop"])
def test_an_example_is_about_ten_lines_that_know_nothing_of_us(profile_name, tmp_path):
    profile = find_profile(profile_name)
    probe = get_backend(profile.runtime).probe(profile)
    if not probe.can_build:
        pytest.skip(f"{profile.runtime} cannot build here: {probe.reason}")
    artifact = with_example(profile_name, tmp_path)
    lines = [line for line in (artifact.folder / NAME).read_text().splitlines() if line and not line.startswith('"""')]
    assert len(lines) <= 12
    for name in (NAME, PREPROCESS, *([ENGINE] if profile_name == "rtx-desktop" else [])):
        text = (artifact.folder / name).read_text()
        ast.parse(text)
        assert "fofa_deploy" not in text


def test_a_tensorrt_example_gets_as_far_as_the_missing_device(tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install tensorrt-rtx")
    probe = get_backend("tensorrt-rtx").probe(find_profile("rtx-desktop"))
    artifact, photo = with_example("rtx-desktop", tmp_path), photograph(tmp_path)
    shown = serve(artifact.folder, photo)
    if probe.can_run:
        assert shown.stdout.startswith(f"{photo} ")
        return
    assert shown.stdout == ""
    assert shown.stderr.startswith("no CUDA device (cudaError")
    assert "model.engine runs on the GPU that it was built for" in shown.stderr
    artifact.path.unlink()
    assert "trtexec --onnx=model.onnx" in serve(artifact.folder, photo).stderr


def test_an_artifact_with_exact_kernels_is_served_with_them(tmp_path):
    artifact = with_example("cpu-onnxruntime", tmp_path)
    options = {**artifact.recipe.options, "exact_kernels": True}
    recipe = artifact.recipe.model_copy(update={"precision": Precision.INT8, "options": options})
    write_example(artifact.model_copy(update={"recipe": recipe}))
    assert '"session.x64quantprecision", "1"' in (artifact.folder / NAME).read_text()
    assert serve(artifact.folder, photograph(tmp_path)).returncode == 0


def test_an_example_for_cuda_does_not_go_on_with_the_cpu(tmp_path):
    if get_backend("onnxruntime").probe(find_profile("cuda-onnxruntime")).can_run:
        pytest.skip("there is a CUDA device")
    artifact = with_example("cpu-onnxruntime", tmp_path)
    recipe = artifact.recipe.model_copy(update={"options": {**artifact.recipe.options, "provider": "CUDAExecutionProvider"}})
    write_example(artifact.model_copy(update={"recipe": recipe}))
    shown = serve(artifact.folder, photograph(tmp_path), warnings="ignore")
    assert (shown.stdout, shown.returncode) == ("", 1)
    assert "CUDA does not start" in shown.stderr or "CUDA failure" in shown.stderr


def test_a_device_that_builds_its_engine_gets_its_example_too(tmp_path):
    """JetPack's own package, and an engine that is not there yet."""
    artifact = with_example("cpu-onnxruntime", tmp_path)
    shutil.rmtree(artifact.folder)
    artifact.folder.mkdir()
    jetson = artifact.model_copy(update={"backend": "tensorrt"})
    write_example(jetson)
    assert "import tensorrt as trt\nfrom engine import Engine" in (artifact.folder / NAME).read_text()
    assert (artifact.folder / ENGINE).is_file()


def test_a_runtime_without_an_example_gets_none(tmp_path):
    artifact = Artifact.load(build(write_graph(tmp_path / "graph"), "reference", tmp_path / "artifact"))
    assert example(artifact) is None
    write_example(artifact)
    assert {path.name for path in artifact.folder.iterdir()} == {"model.onnx", "artifact.json", "sidecar.json"}
