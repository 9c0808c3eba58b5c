"""The input size is chosen with the network: Fashion-MNIST at 16 and 32 pixels, by a teacher that stays at 32."""

import json
import math
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest

from fofa_deploy.config import DataPlan, load_plan
from fofa_deploy.data import load_data
from fofa_deploy.errors import PlanError
from fofa_deploy.pipeline import compress_and_export, opened, reopened
from fofa_deploy.progress import Quiet
from fofa_deploy.select.apart import commands
from fofa_deploy.types import Graph, Status, digest_file

FASHION = Path("/usr/share/datasets/fashion-mnist")
pytestmark = pytest.mark.skipif(not FASHION.is_dir(), reason=f"Debian's dataset-fashion-mnist is not installed in {FASHION}")

PLAN = f"""
name = "sizes"
targets = ["cpu-onnxruntime"]
threads = 1

[data]
name = "idx"
root = "{FASHION}"
image_size = 32
channels = 1
limit = 512
validation_fraction = 0.01
flip = true
shift = 2

[teacher]
model = "timm:vit_tiny_patch16_224"
arguments = {{ patch_size = 8, embed_dim = 48, depth = 2, num_heads = 3 }}
floor_top1 = 0.3
fit = {{ epochs = 10, batch_size = 16, lr = 3e-3, warmup_epochs = 0.2 }}

[student]
model = "auto"

[select]
candidates = [
    {{ model = "timm:resnet10t", name = "cnn", arguments = {{ channels = [64, 64, 64, 128], stem_width = 32 }} }},
    {{ model = "timm:xcit_nano_12_p16_224", name = "odd", image_size = 24 }},
]
image_sizes = [16, 32]
teacher = false
rungs = 1
first = 0.25
seconds = 0.3

[distill]
epochs = 2
batch_size = 32
lr = 3e-3
warmup_epochs = 0.2
fofa = {{ stages = 2, width = 16, heads = 2 }}

[qat]
when = "always"
epochs = 1

[accuracy]
max_top1_drop = 1.0

[verify]
samples = 200

[measure]
seconds = 0.2
max_seconds = 0.5
"""


@pytest.fixture(scope="module")
def plan_file(tmp_path_factory):
    """A plan, with a latency aid of its own."""
    folder = tmp_path_factory.mktemp("sizes")
    (folder / "plan.toml").write_text(PLAN)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FOFA_DEPLOY_LATENCIES", str(folder / "aid"))
        yield folder / "plan.toml"


def candidates(selection):
    return {one.name: one for one in selection.candidates}


@pytest.fixture(scope="module")
def free(plan_file):
    """What is chosen without a budget, and its run directory."""
    out = plan_file.with_name("free")
    with opened(load_plan(str(plan_file)), out, Quiet()) as run:
        return run.selection, out


def test_every_candidate_is_captured_and_timed_at_every_size(free):
    selection, out = free
    found = candidates(selection)
    assert {name: one.image_size for name, one in found.items()} == {"cnn-16": (16, 16), "cnn-32": (32, 32), "odd-24": (24, 24)}
    small, large = (found[name].targets[0].speed.p50_ms for name in ("cnn-16", "cnn-32"))
    assert small < large
    graphs = [out / "candidates" / name / "speed" / "graph" for name in ("cnn-16", "cnn-32")]
    assert [Graph.load(folder).sidecar.preprocessing.image_size for folder in graphs] == [(16, 16), (32, 32)]
    assert len({digest_file(folder / "model.onnx") for folder in graphs}) == 2, "the aid knows a graph by its digest"
    assert [np.load(out / "calibration" / side / "images" / "images.npy").shape[2:] for side in ("16", "32")] == [
        (16, 16),
        (32, 32),
    ]
    page = (out / "selection" / "selection.md").read_text()
    assert "| cnn-16 | 16 |" in page
    assert "| cnn-32 | 32 |" in page


def test_a_network_that_does_not_take_a_size_is_out_with_its_reason(free):
    odd = candidates(free[0])["odd-24"]
    assert odd.params is None
    assert odd.fate.startswith("not captured: timm:xcit_nano_12_p16_224 cannot be made for images of 24 x 24")
    assert odd.rungs == ()


def test_rungs_are_trained_at_the_candidates_size_by_the_teacher_at_its_own(free):
    selection, out = free
    for name, size in (("cnn-16", [16, 16]), ("cnn-32", [32, 32])):
        summary = json.loads((out / "candidates" / name / "rung-1" / "summary.json").read_text())
        assert summary["image_size"] == size
        assert candidates(selection)[name].affinity is not None
        curve = json.loads((out / "candidates" / name / "rung-1" / "curve.json").read_text())
        assert curve[0]["diagnostics"]["teacher_top1"] == pytest.approx(
            json.loads((out / "teacher" / "summary.json").read_text())["top1_validation"], abs=0.01
        ), "the teacher sees what it was trained on, whatever the student sees"


@pytest.fixture(scope="module")
def tight(free, plan_file):
    """The same with a latency that the small one keeps and the large one does not; and what is made of it."""
    small, large = (candidates(free[0])[name].targets[0].speed.p90_ms for name in ("cnn-16", "cnn-32"))
    plan = load_plan(str(plan_file), [f"budget.p90_ms={math.sqrt(small * large)}"])
    out = plan_file.with_name("tight")
    shutil.copytree(free[1], out)
    return plan, out, compress_and_export(plan, out, Quiet(), force=True)


def test_a_tight_budget_takes_the_smaller_size_to_the_end(tight):
    _, out, report = tight
    found = {row.name: row for row in report.choice.rows}
    assert found["cnn-16"].chosen
    assert "p90_ms" in found["cnn-32"].fate
    assert found["cnn-32"].rungs == ()
    chosen = [row for row in report.targets if row.chosen]
    assert [row.status for row in chosen] == [Status.VERIFIED]
    assert report.student.image_size == (16, 16)
    assert report.teacher.image_size == (32, 32)
    assert report.sidecar.preprocessing.image_size == (16, 16)
    deployed = [json.loads(file.read_text()) for file in out.glob("artifacts/cpu-onnxruntime/*/sidecar.json")]
    assert len(deployed) > 1
    assert all(sidecar["preprocessing"]["image_size"] == [16, 16] for sidecar in deployed)
    assert any(row.recipe.startswith("qat") for row in report.targets)
    assert "16 × 16" in (out / "report.html").read_text()  # noqa: RUF001


def test_what_it_is_verified_on_is_resized_from_the_originals(tight):
    plan, out, _ = tight
    stored = np.load(out / "data-16" / "validation" / "images.npy")
    anew = load_data(plan.data.model_copy(update={"image_size": (16, 16)}), plan.seed).validation.head(200)
    assert np.array_equal(stored, anew.source.images(anew.indices))
    golden = np.load(out / "graph" / "golden.npz")["images"]
    preprocessing = Graph.load(out / "graph").sidecar.preprocessing
    assert np.array_equal(golden, preprocessing.apply(stored[: len(golden)]))


def test_the_reference_is_the_teacher_at_its_own_size(tight):
    _, out, report = tight
    assert Graph.load(out / "reference" / "graph").sidecar.preprocessing.image_size == (32, 32)
    assert report.reference.status is Status.VERIFIED
    assert report.reference.golden.relative_error < 1e-3
    assert report.reference.speedup is not None or report.reference.latency_ms is not None


def test_the_same_command_again_makes_nothing_anew(tight):
    plan, out, _ = tight
    again = compress_and_export(plan, out, Quiet())
    made = {stage.stage.split("/")[0] for stage in again.stages if not stage.reused}
    assert made <= {"artifacts", "observed", "verification"}, "a race between recipes may end otherwise the next time"
    assert {"data-16", "teacher", "selection", "student", "graph", "expected"} <= {stage.stage for stage in again.stages}
    with reopened(out, Quiet(), stored=True) as run:
        assert run.splits == out / "data-16"
        assert run.plan.student.image_size == (16, 16)


def test_runs_of_ones_own_are_told_their_size(tight, free):
    plan, out, _ = tight
    selection = free[0]
    both = [
        selection.model_copy(update={"name": name, "student": candidates(selection)[name].student, "target": target})
        for name, target in (("cnn-16", "cpu-onnxruntime"), ("cnn-32", "cpu-openvino"))
    ]
    several = plan.model_copy(update={"targets": ("cpu-onnxruntime", "cpu-openvino")})
    lines = commands(both[0].model_copy(update={"others": (both[1],)}), several, out)
    told = [shlex.split(line) for line in lines if line.startswith("fofa-deploy")]
    settings = [[words[i + 1] for i, word in enumerate(words) if word == "--set"] for words in told]
    assert [load_plan(str(out / "plan.json"), each).student.image_size for each in settings] == [(16, 16), None]
    with_board = several.model_copy(update={"targets": (*several.targets, "jetson-orin"), "required": ("jetson-orin",)})
    lines = commands(both[0].model_copy(update={"others": (both[1],)}), with_board, out)
    told = [line for line in lines if line.startswith("fofa-deploy")]
    assert ["jetson-orin" in line for line in told] == [True, False], "what cannot be measured here is not dropped"
    assert 'required=["jetson-orin"]' in told[0]


def test_a_size_that_is_none_is_refused_in_words(plan_file):
    with pytest.raises(PlanError, match=r"select\.image_sizes\[1\]"):
        load_plan(str(plan_file), ["select.image_sizes=[16, 'large']"])
    with pytest.raises(PlanError, match=r"nothing beside it in \[student\]"):
        load_plan(str(plan_file), ["student.image_size=16"])


def test_a_plan_at_another_size_shifts_as_far_of_the_picture():
    plan = DataPlan(name="digits", image_size=(32, 32), shift=2)
    assert (plan.at((16, 16)).shift, plan.at((64, 64)).shift) == (1, 4)
    assert plan.at(None) is plan.at((32, 32)) is plan
