"""The teacher is a candidate that needs no training: chosen where it keeps the budget and nobody is as good."""

import pytest

from fofa_deploy.config import TeacherPlan, load_plan
from fofa_deploy.distill.job import read_curve
from fofa_deploy.pipeline import compress_and_export, opened, reopened
from fofa_deploy.progress import Quiet
from fofa_deploy.select.candidates import itself
from fofa_deploy.select.search import Selector
from fofa_deploy.types import Status

TEACHER = "{channels=[32,32,64,64],stem_width=16}"
SMALL = (
    "threads=1",
    "required=[]",
    "targets=['cpu-onnxruntime']",
    "data.limit=512",
    "data.image_size=16",
    f"teacher.arguments={TEACHER}",
    "teacher.fit={epochs=4,batch_size=32,lr=3e-3,warmup_epochs=0.2}",
    "teacher.floor_top1=0.0",
    "student={model='auto'}",
    "select.candidates=[{model='timm:vit_tiny_patch16_224',name='vit',arguments={patch_size=8,embed_dim=16,depth=1,num_heads=2}}]",
    "select.rungs=1",
    "select.first=0.1",
    "select.seconds=0.1",
    "distill.epochs=1",
    "distill.fofa={stages=1,width=16,heads=2}",
    "accuracy.max_top1_drop=1.0",
    "measure={seconds=0.2,max_seconds=0.5}",
)


@pytest.fixture(scope="module")
def chosen(tmp_path_factory):
    folder = tmp_path_factory.mktemp("itself")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FOFA_DEPLOY_LATENCIES", str(folder / "aid"))
        yield folder / "run", compress_and_export(load_plan("demo", SMALL), folder / "run", Quiet())


def test_a_teacher_that_keeps_the_budget_is_deployed_as_it_is(chosen):
    out, report = chosen
    rows = {row.name: row for row in report.choice.rows}
    assert rows["teacher-16"].chosen
    assert rows["teacher-16"].rungs == (report.teacher.top1_validation,)
    assert (report.student.model, report.student.top1) == (report.teacher.model, report.teacher.top1)
    assert report.method == "none"
    assert not (out / "student" / "curve.json").exists(), "nothing was trained"
    assert [row.status for row in report.targets if row.chosen] == [Status.VERIFIED]


def test_a_run_directory_knows_it_by_itself(chosen):
    out, report = chosen
    with reopened(out, Quiet(), stored=True) as run:
        assert run.plan.distill is None
        assert run.plan.student.model == report.teacher.model


def test_it_is_trained_on_for_int8_as_the_plan_distills(chosen):
    with opened(load_plan("demo", [*SMALL, "qat.epochs=1"]), chosen[0], Quiet(), force=True) as run:
        assert run.selection.ready
        (epoch,) = read_curve(run.retrained)
    assert "dist" in epoch.losses, "the term of the default method that looks at logits"
    assert epoch.step > 10, "512 images in batches of the plan's 32, not of 128"


@pytest.mark.parametrize("more", ["budget.size_bytes=110000", "select.teacher=false"])
def test_otherwise_a_student_is_trained(chosen, more):
    with opened(load_plan("demo", [*SMALL, more]), chosen[0], Quiet(), force=True) as run:
        assert run.selection.name == "vit-16"
        assert run.plan.distill
        told = {one.name: one for one in run.selection.candidates}
    assert more == "select.teacher=false" or told["teacher-16"].targets[0].missed


def test_a_pruned_teacher_is_no_student(chosen):
    with opened(load_plan("demo", [*SMALL, "teacher.prune=0.25"]), chosen[0], Quiet(), force=True) as run:
        assert [one.name for one in run.selection.candidates] == ["vit-16"]


@pytest.mark.parametrize(("teacher", "told"), [({"fit": {"epochs": 1}}, 0), ({"checkpoint": "teacher.safetensors"}, 1)])
def test_the_accuracy_of_a_teacher_from_elsewhere_may_flatter_it(teacher, told):
    plan = TeacherPlan(model="timm:resnet18", **teacher)
    selector = Selector(load_plan("demo", SMALL).model_copy(update={"teacher": plan}), (), None, None, None)
    notices = selector._flattered([itself(plan, (16, 16))])
    assert len(notices) == told
    assert all("select.teacher = false" in notice for notice in notices)
    assert selector._flattered([]) == []
