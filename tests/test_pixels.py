"""Graphs that take uint8 pixels: the same function, with as little in front as is exact, from the plan to the example beside it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from PIL import Image
from sklearn.datasets import load_sample_image
from tiny import weights, write_graph
from torch import Tensor, nn

from fofa_deploy.adopt import Preparation, adopt, read_sidecar
from fofa_deploy.backend import get_backend
from fofa_deploy.capture import capture
from fofa_deploy.config import AccuracyPlan, DataPlan, LimitsPlan, MeasurePlan, load_plan
from fofa_deploy.data import Split
from fofa_deploy.data.decode import to_pixels
from fofa_deploy.data.sources import ArraySource
from fofa_deploy.errors import GraphError
from fofa_deploy.files import Wish, measure_files, subjects
from fofa_deploy.measure import Candidate
from fofa_deploy.pipeline import opened
from fofa_deploy.pixels import take_pixels
from fofa_deploy.profile import find_profile
from fofa_deploy.progress import Quiet
from fofa_deploy.remote.bundle import Line, job_for, write_bundle
from fofa_deploy.remote.results import compare_outputs, read_results
from fofa_deploy.serving import NAME
from fofa_deploy.store import Store
from fofa_deploy.tune import Settings
from fofa_deploy.types import Artifact, Budget, Graph, Preprocessing, Sidecar, Status, TensorSpec
from fofa_deploy.verify import GraphCheck, check_graph

SIDE, CLASSES = 32, ("a", "b", "c")
PREPROCESSING = Preprocessing(image_size=(SIDE, SIDE), channels=3, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
TOLERANCE = 1e-5
"""Largest error of a logit, relative to the largest logit: float32 rounds at 6e-8, and some hundred products are added up."""
QUICK = MeasurePlan(seconds=0.02, max_seconds=0.1, warmup_seconds=0.01, warmup_runs=5)
LIMITS = LimitsPlan(run_seconds=60, build_seconds=60)
SETTINGS = Settings(AccuracyPlan(), QUICK, LIMITS, Budget(), 0, "fp32", batches=(2,))


def photographs(count: int = 32) -> np.ndarray:
    """uint8 (B,32,32,3): crops of a real photograph."""
    whole, rng = load_sample_image("flower.jpg"), np.random.default_rng(0)
    tops, lefts = rng.integers(0, whole.shape[0] - SIDE, count), rng.integers(0, whole.shape[1] - SIDE, count)
    return np.stack([whole[top : top + SIDE, left : left + SIDE] for top, left in zip(tops, lefts, strict=True)])


class Twice(nn.Module):
    """Two layers read the image: neither weights nor bias of one of them can take what both need."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 3, 4, 4), nn.Conv2d(3, 3, 8, 4, 2)

    def forward(self, images: Tensor) -> Tensor:
        return (self.left(images) + self.right(images)).mean((2, 3))


class Sized(nn.Module):
    """Beside the convolution, the batch size is asked of the image."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.token, self.head = nn.Conv2d(3, 8, 8, 8), nn.Parameter(torch.randn(1, 1, 8)), nn.Linear(8, 3)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patches(images).flatten(2).transpose(1, 2)
        return self.head(torch.cat([self.token.expand(images.shape[0], -1, -1), tokens], 1).relu().mean(1))


def headed(first: nn.Module) -> nn.Module:
    return nn.Sequential(first, nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.LazyLinear(3))


MODELS = {
    "padded convolution": (lambda: headed(nn.Conv2d(3, 8, 3, 2, 1)), ["Sub"]),
    "padded convolution without bias": (lambda: headed(nn.Conv2d(3, 8, 3, 2, 1, bias=False)), ["Sub"]),
    "patches": (lambda: headed(nn.Conv2d(3, 8, 4, 4)), []),
    "patches without bias": (lambda: headed(nn.Conv2d(3, 8, 4, 4, bias=False)), []),
    "a group for each channel": (lambda: headed(nn.Conv2d(3, 6, 3, groups=3)), []),
    "padded groups": (lambda: headed(nn.Conv2d(3, 6, 3, padding=1, groups=3)), ["Sub"]),
    "shape asked for": (Sized, []),
    "two readers": (Twice, ["Sub", "Div"]),
    "matrix product": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(3 * SIDE * SIDE, 3)), ["Sub", "Div"]),
}


def captured(model: nn.Module, folder, preprocessing: Preprocessing = PREPROCESSING) -> Graph:
    folder.mkdir(exist_ok=True)
    source = ArraySource(photographs(), np.zeros(32, np.int64), CLASSES, DataPlan(name="images", image_size=SIDE), "crops")
    capture(model.eval(), "tiny", preprocessing, CLASSES, Split(source, np.arange(32)), folder, "uint8-nhwc")
    return Graph.load(folder)


def logits(graph: Graph, images: np.ndarray, folder, profile_name: str) -> np.ndarray:
    """Of uint8 (B,H,W,C), fed as they are."""
    profile = find_profile(profile_name)
    backend = get_backend(profile.runtime)
    recipe = next(recipe for recipe in backend.recipes(profile, graph) if recipe.name == "fp32")
    folder.mkdir()
    artifact = backend.build(graph, recipe, None, folder)
    with backend.load(Artifact.load(artifact.folder), profile) as session:
        return session.run({"pixels": images})["logits"]


@pytest.mark.parametrize("name", MODELS)
def test_pixels_give_what_normalized_images_gave(name, tmp_path):
    torch.manual_seed(0)
    make, left = MODELS[name]
    model, images = make(), photographs()
    normalized = torch.from_numpy(PREPROCESSING.apply(images.transpose(0, 3, 1, 2)))
    with torch.no_grad():
        expected = model(normalized).numpy()
    graph = captured(model, tmp_path)
    operators = [node.op_type for node in onnx.load(graph.path).graph.node]
    assert operators[: 2 + len(left)] == ["Cast", "Transpose", *left]
    assert not {"Sub", "Div"} & set(operators[2 + len(left) :])
    for profile_name in ("reference", "cpu-onnxruntime", "cpu-openvino"):
        found = logits(graph, images, tmp_path / profile_name, profile_name)
        assert np.abs(found - expected).max() <= TOLERANCE * np.abs(expected).max(), profile_name
    assert check_graph(GraphCheck(folder=tmp_path, profile=find_profile("cpu-onnxruntime"))).relative_error < TOLERANCE


def test_a_mean_of_zero_needs_no_subtraction_even_where_zeros_are_padded(tmp_path):
    known = PREPROCESSING.model_copy(update={"mean": (0.0,) * 3})
    graph = captured(nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.Flatten(), nn.Linear(2048, 3)), tmp_path, known)
    assert [node.op_type for node in onnx.load(graph.path).graph.node][:3] == ["Cast", "Transpose", "Conv"]
    check_graph(GraphCheck(folder=tmp_path, profile=find_profile("cpu-onnxruntime")))


def test_weights_that_others_read_too_stay_as_they_are(tmp_path):
    """One kernel for the image and for what is made of it."""

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.both = nn.Conv2d(3, 3, 3)

        def forward(self, images: Tensor) -> Tensor:
            return self.both(self.both(images)).mean((2, 3))

    captured(Shared(), tmp_path)
    assert check_graph(GraphCheck(folder=tmp_path, profile=find_profile("cpu-onnxruntime"))).relative_error < TOLERANCE


# --- sidecars and ready-made files --------------------------------------------------------------------------------


def sidecar(**changes) -> Sidecar:
    source, target = TensorSpec(name="images", shape=(None, 3, 4, 5)), TensorSpec(name="logits", shape=(None, 3))
    known = PREPROCESSING.model_copy(update={"image_size": (4, 5)})
    plain = Sidecar(model="m", input=source, output=target, preprocessing=known, class_names=CLASSES)
    return plain.model_copy(update=changes)


def test_a_graph_that_calls_its_own_input_pixels_keeps_its_answers(tmp_path):
    plain = write_graph(tmp_path)
    model, sidecar = onnx.load(plain.path), plain.sidecar
    model.graph.input[0].name = model.graph.node[0].input[0] = "pixels"
    named = sidecar.model_copy(update={"input": sidecar.input.model_copy(update={"name": "pixels"})})
    taken, told = take_pixels(model, named)
    onnx.checker.check_model(taken, full_check=True)
    images = np.random.default_rng(0).integers(0, 256, (4, *sidecar.preprocessing.image_size, 1), np.uint8)
    found = ReferenceEvaluator(taken).run(None, {told.input.name: images})[0]
    expected = sidecar.preprocessing.apply(images.transpose(0, 3, 1, 2)).reshape(4, -1) @ weights()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "uint8"])
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_a_sidecar_prepares_images_in_its_type_and_layout(dtype, layout):
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 4, 5), np.uint8)
    spec = TensorSpec(name="images", shape=(None, 3, 4, 5), dtype=dtype)
    found = sidecar(input=spec, layout=layout).prepare(images)
    assert found.dtype == dtype
    assert found.flags.c_contiguous
    expected = images if dtype == "uint8" else sidecar().preprocessing.apply(images)
    np.testing.assert_array_equal(found.transpose(0, 3, 1, 2) if layout == "NHWC" else found, expected)


def test_a_sidecar_of_normalized_images_is_written_as_it_always_was():
    text = sidecar().model_dump_json()
    assert "layout" not in text
    assert Sidecar.model_validate_json(text) == sidecar()


@pytest.mark.parametrize(
    ("shape", "kind", "expected"),
    [
        (("batch", 1, 4, 4), onnx.TensorProto.UINT8, ("uint8", "NCHW")),
        (("batch", 4, 4, 1), onnx.TensorProto.UINT8, ("uint8", "NHWC")),
        (("batch", 4, 4, 1), onnx.TensorProto.FLOAT, ("float32", "NHWC")),
    ],
)
def test_a_ready_made_file_says_itself_how_it_takes_images(tmp_path, shape, kind, expected):
    found = read_sidecar(tiny_file(tmp_path, shape, kind), Preparation())
    assert (found.input.dtype, found.layout) == expected
    assert (found.preprocessing.channels, found.preprocessing.image_size) == (1, (4, 4))


def test_a_ready_made_file_of_another_type_is_refused(tmp_path):
    with pytest.raises(GraphError, match="takes images in float16"):
        read_sidecar(tiny_file(tmp_path, ("batch", 1, 4, 4), onnx.TensorProto.FLOAT16), Preparation())
    model = onnx.load(tmp_path / "model.onnx")
    model.graph.input[0].type.tensor_type.elem_type = 99
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(GraphError, match="takes images in a type that is none"):
        read_sidecar(tmp_path / "model.onnx", Preparation())


def tiny_file(folder: Path, shape: tuple[str | int, ...], kind: int) -> Path:
    """The tiny graph with another input."""
    write_graph(folder)
    (folder / "sidecar.json").unlink()
    model = onnx.load(folder / "model.onnx")
    model.graph.input[0].CopyFrom(onnx.helper.make_tensor_value_info("pictures", kind, shape))
    model.graph.node.insert(0, onnx.helper.make_node("Cast", ["pictures"], ["images"], "cast", to=onnx.TensorProto.FLOAT))
    onnx.save(model, folder / "model.onnx")
    return folder / "model.onnx"


def test_a_ready_made_file_gets_pixels_in_front_and_keeps_its_answers(tmp_path):
    write_graph(tmp_path)
    (tmp_path / "sidecar.json").unlink()
    preparation = Preparation(mean=(0.3,), std=(0.7,), pixels=True)
    with Store(tmp_path / "store") as store:
        tuner = adopt(store, tmp_path / "model.onnx", None, preparation, Quiet(), SETTINGS)
        (row,) = tuner.attempt(find_profile("cpu-onnxruntime"))
        assert row.status is Status.VERIFIED, row.reason
        artifact = Artifact.load(store.root / row.artifact)
    with np.load(store.root / "graph" / "golden.npz") as golden:
        pixels, expected = golden["images"], golden["logits"]
    assert (pixels.dtype, pixels.shape[1:]) == (np.uint8, (4, 4, 1))
    np.testing.assert_allclose(((pixels / 255 - 0.3) / 0.7).reshape(len(pixels), -1) @ weights(), expected, rtol=1e-4, atol=1e-4)
    alone = Path(shutil.copy(artifact.path, tmp_path / "alone.onnx"))
    assert read_sidecar(alone, Preparation()) == artifact.sidecar, "the file itself says what it takes"
    with Store(tmp_path / "again") as store:
        (row,) = adopt(store, alone, None, Preparation(), Quiet(), SETTINGS).attempt(find_profile("cpu-openvino"))
        assert row.status is Status.VERIFIED, row.reason
    with pytest.raises(GraphError, match="takes images in uint8, NHWC"):
        take_pixels(onnx.load(alone), artifact.sidecar)


# --- the whole way ------------------------------------------------------------------------------------------------

PLAN = """
name = "pixels"
targets = ["cpu-onnxruntime", "cpu-openvino", "rtx-desktop"]
threads = 1

[data]
name = "digits"
image_size = 32
mean = [0.485, 0.456, 0.406]
std = [0.229, 0.224, 0.225]

[student]
model = "timm:resnet10t"
arguments = { channels = [8, 16, 16, 32], stem_width = 8 }

[distill]
method = "none"
epochs = 4
batch_size = 32
lr = 3e-3
warmup_epochs = 0.5

[export]
input = "uint8-nhwc"

[accuracy]
max_top1_drop = 0.05

[qat]
when = "never"
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Folder and report of a run; nothing is timed, so that no recipe is left out for being slow here."""
    root = tmp_path_factory.mktemp("pixels")
    (root / "plan.toml").write_text(PLAN)
    with opened(load_plan(str(root / "plan.toml")), root / "run", Quiet()) as going:
        rows = [row for profile in going.profiles for row in going.tuner().attempt(profile)]
        return root / "run", going.report(rows, going.reference[0])


def artifacts(run, target: str) -> list[Artifact]:
    """The first of each precision that passed."""
    rows = [row for row in run[1].targets if row.target == target and row.status is Status.VERIFIED]
    found = [Artifact.load(run[0] / row.artifact) for row in reversed(rows)]
    return list({artifact.recipe.precision: artifact for artifact in found}.values())


def test_a_plan_that_asks_for_pixels_gets_verified_artifacts_that_take_them(run):
    out, report = run
    for target in ("cpu-onnxruntime", "cpu-openvino"):
        assert {"fp32", "int8"} <= {artifact.recipe.precision for artifact in artifacts(run, target)}, target
    for folder in out.glob("artifacts/*/*"):
        sidecar = Artifact.load(folder).sidecar
        assert (sidecar.input.name, sidecar.input.shape, sidecar.input.dtype) == ("pixels", (None, SIDE, SIDE, 3), "uint8")
        assert sidecar.layout == "NHWC"
    with np.load(out / "graph" / "golden.npz") as golden:
        assert (golden["images"].dtype, golden["images"].shape) == (np.uint8, (16, SIDE, SIDE, 3))
    assert report.reference.status is Status.VERIFIED
    assert "4. Feed as pixels, uint8, NHWC;" in (out / "model_card.md").read_text()
    built = [row for row in report.targets if row.target == "rtx-desktop"]
    reason = get_backend("tensorrt-rtx").probe(find_profile("rtx-desktop")).reason
    assert {row.status for row in built} <= {Status.BUILT_NOT_RUN, Status.VERIFIED, Status.SKIPPED}, reason


@pytest.mark.parametrize("target", ["cpu-onnxruntime", "cpu-openvino"])
def test_the_example_beside_it_serves_a_photograph(run, target, tmp_path):
    photo = tmp_path / "photo.png"
    Image.fromarray(photographs(1)[0]).save(photo)
    for artifact in artifacts(run, target):
        known = artifact.sidecar.preprocessing
        images = to_pixels(Image.open(photo), DataPlan(name="images", classes=10, **known.model_dump()))[None]
        with get_backend(artifact.backend).load(artifact, find_profile(target)) as session:
            expected = session.run({"pixels": artifact.sidecar.prepare(images)})["logits"][0]
        shown = alone([NAME, str(photo)], artifact.folder)
        assert shown.returncode == 0, shown.stderr
        assert shown.stdout.split()[1] == artifact.sidecar.class_names[int(expected.argmax())]
        assert float(shown.stdout.split()[2]) == pytest.approx(float(expected.max()), rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("target", ["cpu-onnxruntime", "cpu-openvino"])
def test_a_carried_bundle_feeds_pixels_on_a_device_without_pytorch(run, target, tmp_path):
    (tmp_path / "lacking").mkdir()
    (tmp_path / "lacking" / "torch.py").write_text("raise ImportError('there is no PyTorch here')")
    for artifact in artifacts(run, target):
        golden, place = run[0] / "graph" / "golden.npz", tmp_path / str(artifact.recipe.precision)
        candidate = Candidate(artifact=artifact.folder, profile=find_profile(target), golden=golden)
        job = job_for(candidate, (Line(batch=1, threads=1), Line(batch=2, threads=1)), QUICK, LIMITS)
        write_bundle(candidate, job, tmp_path / "bundle.zip")
        with zipfile.ZipFile(tmp_path / "bundle.zip") as archive:
            archive.extractall(place)
        done = alone(["run.py"], place, PYTHONPATH=str(tmp_path / "lacking"))
        assert done.returncode == 0, done.stdout + done.stderr
        first, second = read_results((place / "results.json").read_bytes(), "results.json").answers(job)
        assert (first.batch, second.batch) == (1, 2)
        assert compare_outputs(first, job, golden).agreement >= 0.9


def test_an_artifact_by_itself_is_measured_on_noise_of_its_own_type(run):
    artifact = artifacts(run, "cpu-onnxruntime")[0]
    (row,) = measure_files(subjects([artifact.folder], Wish(), SETTINGS), Wish(), SETTINGS, Quiet())
    assert row.inputs == {"pixels": (2, SIDE, SIDE, 3)}
    assert row.measurement is not None, row.reason


def alone(command: list[str], folder: Path, **more: str) -> subprocess.CompletedProcess[str]:
    """In a Python that does not see this package."""
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | more
    return subprocess.run(
        [sys.executable, *command], cwd=folder, env=clean, capture_output=True, text=True, timeout=120, check=False
    )
