"""A student is chosen for real: digits, small networks of three families, two runtimes."""

import contextlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fofa_deploy.config import load_plan
from fofa_deploy.errors import BackendError, PlanError
from fofa_deploy.pipeline import compress_and_export, opened
from fofa_deploy.progress import Quiet
from fofa_deploy.report import read_report
from fofa_deploy.select import clocks
from fofa_deploy.select.apart import commands
from fofa_deploy.select.record import Selection
from fofa_deploy.store import manifests

VIT = "{patch_size=4,embed_dim=32,depth=2,num_heads=2}"
WIDE = "{patch_size=2,embed_dim=192,depth=8,num_heads=4}"
SLIM = "{patch_size=4,embed_dim=16,depth=2,num_heads=2}"
MIXER = "{patch_size=4,embed_dim=32,num_blocks=2}"
CNN = "{channels=[8,16,16,32],stem_width=8}"
CANDIDATES = (
    f"[{{model='timm:vit_tiny_patch16_224',name='vit',arguments={VIT}}},"
    f"{{model='timm:vit_tiny_patch16_224',name='slim',arguments={SLIM}}},"
    f"{{model='timm:vit_tiny_patch16_224',name='wide',arguments={WIDE}}},"
    f"{{model='timm:mixer_s32_224',name='mixer',arguments={MIXER}}},"
    f"{{model='timm:resnet10t',name='cnn',arguments={CNN}}},"
    "{model='timm:resnet18',name='broken',arguments={no_such_argument=1}}]"
)
SMALL = (
    "threads=1",
    "required=[]",
    "data.limit=256",
    "data.image_size=16",
    f"teacher.arguments={CNN}",
    "teacher.fit={epochs=2,batch_size=32,lr=3e-3,warmup_epochs=0.2}",
    "teacher.floor_top1=0.0",
    "student={model='auto'}",
    f"select.candidates={CANDIDATES}",
    "select.teacher=false",
    "select.rungs=2",
    "select.first=0.25",
    "select.seconds=0.1",
    "distill.epochs=4",
    "distill.fofa={stages=2,width=16,heads=2}",
    "accuracy.max_top1_drop=1.0",
    "measure={seconds=0.2,max_seconds=0.5}",
    f"targets=['cpu-onnxruntime','{Path(__file__).parent / 'openvino-fp32.toml'}']",
)


def auto(*more: str):
    return load_plan("demo", [*SMALL, *more])


@pytest.fixture(scope="module")
def aid(tmp_path_factory):
    """Where this module keeps its latency aid."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("aid")
        patch.setenv("FOFA_DEPLOY_LATENCIES", str(folder))
        yield folder


@pytest.fixture(scope="module")
def chosen(aid, tmp_path_factory):
    """A run directory with a selection in it, and that selection."""
    out = tmp_path_factory.mktemp("selection") / "run"
    with opened(auto("budget.size_bytes=2000000"), out, Quiet()) as run:
        return out, run.selection


def named(selection):
    return {one.name.rpartition("-")[0]: one for one in selection.candidates}


def test_every_candidate_is_measured_on_every_target_or_told_why_not(chosen):
    found = named(chosen[1])
    assert set(found) == {"vit", "slim", "wide", "mixer", "cnn", "broken"}
    for name in ("vit", "slim", "wide", "mixer"):
        assert [row.target for row in found[name].targets] == ["cpu-onnxruntime", "openvino-fp32"]
        assert all(row.speed and row.speed.p50_ms > 0 and row.recipe for row in found[name].targets)
    assert found["broken"].params is None
    assert any("broken" in notice and "no_such_argument" in notice for notice in chosen[1].notices)


def test_what_a_target_cannot_build_is_disqualified_with_its_reason(chosen):
    """At 16 px the stem leaves one pixel to a pooling of 2 x 2, which OpenVINO refuses."""
    here, there = named(chosen[1])["cnn"].targets
    assert here.speed
    assert there.speed is None
    assert "OpenVINO cannot build fp32" in there.missed[0]
    assert named(chosen[1])["cnn"].rungs == ()


def test_what_misses_the_budget_is_not_trained(chosen):
    wide = named(chosen[1])["wide"]
    assert all("size_bytes" in row.missed[0] for row in wide.targets)
    assert wide.rungs == ()
    assert not wide.chosen


def test_those_that_fit_climb_and_one_is_chosen_by_what_is_foretold(chosen):
    selection = chosen[1]
    fits = [named(selection)[name] for name in ("vit", "slim", "mixer")]
    assert sorted(len(one.rungs) for one in fits) == [1, 2, 2], "half of three, rounded up, climbs on"
    assert [one.name for one in fits if one.chosen] == [selection.name]
    assert all(0 < one.affinity <= 1 for one in fits)
    assert all(one.affinity is None for one in selection.candidates if not one.rungs)
    assert all(point.seen < selection.foretold.seen for one in fits for point in one.rungs)
    best = max(one.foretold.top1 for one in fits if len(one.rungs) == 2)
    assert selection.foretold.top1 >= best - 0.005


def test_the_record_can_be_read_and_looked_at(chosen):
    folder = chosen[0] / "selection"
    assert Selection.load(folder) == chosen[1]
    assert json.loads((folder / "selection.json").read_text())["schema_version"] == 1
    assert "<svg" in (folder / "front.svg").read_text()
    page = (folder / "selection.md").read_text()
    assert "**chosen**" in page
    assert "an aid" in page


def test_the_whole_job_goes_on_with_the_chosen_one_and_tells_what_became_of_it(chosen):
    out, selection = chosen
    report = compress_and_export(auto("budget.size_bytes=2000000"), out, Quiet())
    assert report.student.model == selection.student.model
    (word,) = [notice for notice in report.notices if "foretold" in notice]
    assert "reached" in word
    assert report.choice == selection.told()
    assert [row.name for row in report.choice.rows if row.chosen] == [selection.name]
    assert {row.name for row in report.choice.rows if row.front} == set(selection.front)
    assert "Which student" in (out / "report.html").read_text()
    assert {timing.stage: timing.reused for timing in report.stages}["selection"]
    assert {row.target for row in report.targets if row.chosen} == {"cpu-onnxruntime", "openvino-fp32"}
    again = subprocess.run(
        [sys.executable, "-m", "fofa_deploy", "report", str(out)], capture_output=True, text=True, timeout=300, check=False
    )
    assert again.returncode == 0, again.stderr


def test_a_second_selection_builds_nothing_that_the_aid_knows_and_trains_again(chosen, tmp_path):
    out = tmp_path / "second"
    shutil.copytree(chosen[0] / "teacher", out / "teacher")
    with opened(auto("budget.size_bytes=2000000"), out, Quiet()) as run:
        speeds = {one.name: [row.speed for row in one.targets] for one in run.selection.candidates}
    assert speeds == {one.name: [row.speed for row in one.targets] for one in chosen[1].candidates}
    assert not list(out.glob("candidates/*/speed/artifacts"))


def test_finished_rungs_are_not_trained_again(chosen, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(chosen[0], out)
    shutil.rmtree(out / "selection")
    before = {path: path.stat().st_mtime_ns for path in out.glob("candidates/*/rung-*/weights.safetensors")}
    with opened(auto("budget.size_bytes=2000000"), out, Quiet()) as run:
        assert run.selection.name == chosen[1].name
    assert before == {path: path.stat().st_mtime_ns for path in out.glob("candidates/*/rung-*/weights.safetensors")}
    assert len(before) == 5
    told = {manifest.stage for manifest in manifests(out)}
    assert {f"candidates/{chosen[1].name}/rung-1", f"candidates/{chosen[1].name}/speed/graph", "selection"} <= told


def test_nobody_fits_names_who_came_nearest(aid, chosen, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(chosen[0], out)
    nobody = auto("budget.size_bytes=1000")
    with (
        pytest.raises(PlanError, match=r"no candidate fits; the nearest is .* size_bytes") as raised,
        opened(nobody, out, Quiet(), True),
    ):
        pass
    assert "cpu-onnxruntime" in raised.value.message
    assert "select.candidates" in raised.value.action


@pytest.mark.parametrize("more", ["student.checkpoint='weights.safetensors'", "student.pretrained=true"])
def test_a_student_that_is_to_be_chosen_has_nothing_else(more):
    with pytest.raises(PlanError, match="auto"):
        auto(more)


def test_the_verb_refuses_a_plan_that_names_its_student(tmp_path):
    command = [sys.executable, "-m", "fofa_deploy", "select", "demo", "--out", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert "student.model" in done.stderr


# --- a student for each target


@pytest.fixture(scope="module")
def divided(aid, tmp_path_factory):
    """Two targets that cannot but have different students: one cannot build the small one, the other has room for no other."""
    root = tmp_path_factory.mktemp("each")
    (root / "small.toml").write_text(
        'name = "small"\ndescription = "d"\nruntime = "onnxruntime"\nprecisions = ["fp32"]\n[budget]\nsize_bytes = 150000\n'
    )
    tiny = "{channels=[4,4,8,8],stem_width=4}"
    large = "{patch_size=4,embed_dim=64,depth=2,num_heads=2}"
    plan = root / "plan.json"
    listed = (
        f"[{{model='timm:resnet10t',name='cnn',arguments={tiny}}},"
        f"{{model='timm:vit_tiny_patch16_224',name='vit',arguments={large}}}]"
    )
    targets = f"targets=['{root / 'small.toml'}','{Path(__file__).parent / 'openvino-fp32.toml'}']"
    more = (f"select.candidates={listed}", targets, "select.rungs=1", f"required=['{root / 'small.toml'}']", "qat.when='never'")
    plan.write_text(auto(*more, "select.fit='each'").model_dump_json())
    return plan, root / "run"


def verb(*words):
    command = [sys.executable, "-m", "fofa_deploy", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)


def test_each_target_gets_its_own_student_and_the_commands_make_them(divided):
    plan, out = divided
    done = verb("select", plan, "--out", out)
    assert done.returncode == 0, done.stderr
    found = Selection.load(out / "selection")
    assert [(one.target, one.name) for one in found.choices] == [("small", "cnn-16"), ("openvino-fp32", "vit-16")]
    assert {one.name: one.chosen_for for one in found.candidates} == {"cnn-16": ("small",), "vit-16": ("openvino-fp32",)}
    assert all(f"## {one.target}: {one.name}" in (out / "selection" / "selection.md").read_text() for one in found.choices)
    refused = verb("compress-and-export", plan, "--out", out)
    assert refused.returncode == 2
    assert "cnn-16 for small, vit-16 for openvino-fp32" in refused.stderr
    lines = [line for line in refused.stderr.splitlines() if line.startswith(("mkdir", "cp", "fofa-deploy"))]
    assert len(lines) == 6
    assert all(line in done.stdout.splitlines() for line in lines)
    with contextlib.chdir(out):
        assert list(commands(found, load_plan(str(plan)), Path())) == lines, "a folder that is named by its place"
    script = "\n".join(line.replace("fofa-deploy", f"{sys.executable} -m fofa_deploy", 1) for line in lines)
    made = subprocess.run(["sh", "-ec", script], capture_output=True, text=True, timeout=600, check=False)
    assert made.returncode == 0, made.stderr
    for choice in found.choices:
        report = read_report(out.with_name(f"run-{choice.name}"))
        assert report.student.model == choice.student.model
        assert [row.target for row in report.targets if row.chosen] == [choice.target]
        reused = {stage.stage: stage.reused for stage in report.stages}
        assert reused["teacher"]
        assert reused["data"]


def test_where_one_is_to_fit_all_and_none_does_the_way_out_is_named(divided, tmp_path):
    shutil.copytree(divided[1].parent / "run", tmp_path / "run")
    done = verb("select", divided[0], "--out", tmp_path / "run", "--force", "--set", "select.fit=all")
    assert done.returncode == 2
    assert "no candidate fits all of small, openvino-fp32" in done.stderr
    assert "select.fit = 'each'" in done.stderr


def test_a_candidate_climbs_for_the_targets_that_it_fits_and_no_others(chosen, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(chosen[0], out)
    with opened(auto("budget.size_bytes=2000000", "select.fit='each'"), out, Quiet(), True, settled=False) as run:
        found = run.choose()
    assert [choice.target for choice in found.choices] == ["cpu-onnxruntime", "openvino-fp32"]
    assert len(list(out.glob("candidates/*/rung-1/weights.safetensors"))) == 4, "the cnn fits one of the targets"


def test_a_device_that_does_not_answer_ends_the_selection_and_is_not_left_out_of_it(chosen, tmp_path, monkeypatch):
    """Its absence is no input of the stage: what was chosen without it would stand when it is back."""
    out = tmp_path / "run"
    shutil.copytree(chosen[0], out)
    shutil.rmtree(out / "selection")
    board = tmp_path / "board.toml"
    board.write_text('name = "board"\ndescription = ""\nruntime = "onnxruntime"\nprecisions = ["fp32"]\n[device]\nhost = "board"\n')

    def silent(*_):
        raise BackendError("board cannot be reached: no answer", "try ssh board by hand")

    monkeypatch.setattr(clocks, "examine", silent)
    plan = auto("budget.size_bytes=2000000", f"targets=['cpu-onnxruntime','{board}']")
    with pytest.raises(BackendError, match="board cannot be reached"), opened(plan, out, Quiet(), force=True):
        pass
    assert not (out / "selection").exists()
