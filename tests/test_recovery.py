"""A student that loses its accuracy in int8 gets it back by training, through the ordinary pipeline and its back ends."""

from __future__ import annotations

import narrow
import pytest

from fofa_deploy.backend import get_backend
from fofa_deploy.config import AccuracyPlan, RunPlan, ready_made
from fofa_deploy.data import load_data
from fofa_deploy.distill.job import Workshop, retraining
from fofa_deploy.errors import PlanError
from fofa_deploy.judge import accuracy_problem
from fofa_deploy.models import save_weights
from fofa_deploy.pipeline import Run, compress_and_export, reopened
from fofa_deploy.profile import find_profile
from fofa_deploy.progress import Quiet
from fofa_deploy.recovery import PREFIX, recovered
from fofa_deploy.results import Comparison
from fofa_deploy.runner.machine import cpu_flags
from fofa_deploy.schema import validate
from fofa_deploy.store import Store
from fofa_deploy.types import Artifact, Graph, HardwareProfile, Precision, Status
from fofa_deploy.verify import Verification

STUDENT = {"model": "narrow:Narrow", "taps": narrow.TAPS}
PLAN = {
    "name": "narrow",
    "threads": 1,
    "targets": ["cpu-onnxruntime"],
    "data": {"name": "digits", "image_size": 16, "channels": 1, "shift": 1, "validation_fraction": 0.2},
    "accuracy": {"max_top1_drop": 0.03},
    "measure": {"seconds": 0.2, "max_seconds": 0.5},
}
OCTAVES = 8


def plan(student=STUDENT, **tables) -> RunPlan:
    return validate({**PLAN, "student": student, **tables}, RunPlan, "test")


@pytest.fixture(scope="module")
def spread(tmp_path_factory) -> RunPlan:
    """The plan of a trained network that int8 ruins: no scale per tensor suits all of its channels."""
    folder = tmp_path_factory.mktemp("float")
    alone = plan(distill={"method": "none", "epochs": 6, "batch_size": 32, "lr": 3e-3})
    workshop = Workshop(load_data(alone.data, 0), 0, 1, Quiet())
    workshop.distill(alone.student, alone.distill, folder, None)
    model = workshop.load(alone.student, folder)
    narrow.spread(model, OCTAVES)
    save_weights(model, folder / "spread.safetensors")
    return plan({**STUDENT, "checkpoint": str(folder / "spread.safetensors")}, qat={"when": "always", "epochs": 10, "lr": 5e-4})


@pytest.fixture(scope="module")
def finished(spread, tmp_path_factory):
    out = tmp_path_factory.mktemp("recovery") / "run"
    return out, compress_and_export(spread, out, Quiet())


def attempted(finished, spread, profile: HardwareProfile, recipe: str | None = None, **qat):
    changed = spread.model_copy(update={"qat": spread.qat.model_copy(update=qat)})
    with Store(finished[0]) as store:
        run = Run(changed, store, Quiet())
        return run.tuner(recipe, timed=False).attempt(profile), run.notices


def test_a_finished_run_finds_its_artifacts_again(finished):
    out, report = finished
    with reopened(out, Quiet(), stored=True) as run:
        tuner = run.tuner(build=False, timed=False)
        rows = tuner.attempt(run.profiles[0])
        found = {row.recipe: row.sha256 for row in rows}
        assert {row.recipe: row.sha256 for row in report.targets if row.sha256}.items() <= found.items()
        golden = {row.recipe: tuner.candidate(run.profiles[0], row).golden.parent.name for row in rows}
        assert {name: folder for name, folder in golden.items() if name.startswith(PREFIX) == (folder == "graph")} == {}
        assert {timing.stage.partition("/")[0] for timing in run.store.timings if not timing.reused} <= {"verification"}


def test_training_recovers_what_quantization_lost(finished, spread):
    tried, _ = attempted(finished, spread, find_profile("cpu-onnxruntime"))
    rows = {row.recipe: row for row in tried}
    lost = [row for name, row in rows.items() if name.startswith("int8") and row.status is Status.REJECTED]
    retrained = {name: row for name, row in rows.items() if name.startswith(PREFIX)}
    kinds = {"int8-u8s7-per-channel", "int8-u8s8-per-channel-exact", "int8-u8s8-per-channel"}
    assert kinds & {name.removeprefix(PREFIX) for name in retrained}
    bar = rows["fp32"].validation.top1 - 0.03
    # With VNNI eight bits are exact, and of this network enough is left without training: then only the recovered ones are held.
    if "avx512_vnni" not in cpu_flags():
        assert lost
        assert max(row.validation.top1 for row in lost) < bar
    for name, after in retrained.items():
        assert after.status is Status.VERIFIED, after.reason
        assert Artifact.load(finished[0] / after.artifact).recipe.precision == Precision.INT8, name
        assert after.validation.top1 > bar
        assert after.validation.agreement > 0.97, "with the retrained student's own logits"


def test_retrained_recipes_compete_and_their_curve_is_told(finished):
    _, report = finished
    assert any(row.recipe.startswith(PREFIX) and row.latency_ms for row in report.targets)
    assert [epoch.epoch for epoch in report.curves["student-qat"]] == list(range(1, 11))


@pytest.mark.parametrize("when", ["never", "needed"])
def test_training_is_due_where_no_int8_recipe_is_good_enough(finished, spread, when):
    rows, _ = attempted(finished, spread, find_profile("cpu-onnxruntime"), when=when)
    retrained = [row for row in rows if row.recipe.startswith(PREFIX)]
    passed = [row for row in rows if row.recipe.startswith("int8") and row.status is Status.VERIFIED]
    assert bool(retrained) == (when == "needed" and not passed)


@pytest.mark.parametrize(("name", "package"), [("cpu-openvino", "openvino"), ("rtx-desktop", "tensorrt_rtx")])
def test_other_back_ends_build_the_retrained_student(finished, spread, name, package):
    pytest.importorskip(package, reason=f"{package} is an optional extra")
    profile = find_profile(name).model_copy(update={"precisions": (Precision.INT8,)})
    offered = get_backend(profile.runtime).recipes(profile, Graph.load(finished[0] / "graph-qat"))
    rows, _ = attempted(finished, spread, profile, f"{PREFIX}{offered[0].name}")
    (row,) = rows
    assert row.precision.get("int8"), row.reason
    artifact = Artifact.load(finished[0] / row.artifact)
    assert artifact.graph_sha256 == Graph.load(finished[0] / "graph-qat").sha256
    assert artifact.size_bytes > 1000
    if row.status is not Status.BUILT_NOT_RUN:
        assert row.status is Status.VERIFIED, row.reason


def test_the_bar_is_the_student_before():
    budget = recovered(AccuracyPlan(max_top1_drop=0.02), 0.9)

    def judged(top1: float) -> str:
        found = Comparison(samples=100, finite=True, top1=top1, agreement=1.0)
        return accuracy_problem(Precision.INT8, Verification(golden=found, whole=found, expected_top1=0.99), budget)

    assert judged(0.88) == ""
    assert "below the floor of 88.00%" in judged(0.87)
    assert recovered(AccuracyPlan(min_top1=0.95), 0.9).min_top1 == 0.95


def test_without_labels_nothing_is_trained(tmp_path):
    (tmp_path / "weights.safetensors").touch()
    made = ready_made(tmp_path / "weights.safetensors", "timm:resnet10t", 10, tmp_path)
    with Store(tmp_path / "run") as store, pytest.raises(PlanError, match="without labels"):
        _ = Run(made, store, Quiet()).retrained


def test_a_student_without_a_teacher_teaches_itself():
    assert retraining(plan(distill={"method": "none"})).method == "kd"
    taught = {"model": "timm:resnet10t", "fit": {"epochs": 1}}
    found = retraining(plan(teacher=taught, distill={"method": "dkd+fofa+rsd", "lr": 1e-2, "batch_size": 16}, qat={"epochs": 2}))
    assert (found.method, found.epochs, found.lr, found.batch_size) == ("dkd", 2, 1e-3, 16)
    exits = retraining(plan(teacher=taught, distill={"method": "ofa+dist"}))
    assert exits.method == "dist", "OFA's exits would start anew"
