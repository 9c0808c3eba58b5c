"""All that a plan names is looked up before anything is done, and all that is missing is told at once."""

from __future__ import annotations

import pytest
from tiny import run_cli

from fofa_deploy.config import RunPlan
from fofa_deploy.errors import ModelError, PlanError, UserError
from fofa_deploy.lookup import look_up
from fofa_deploy.recorded import PROFILES, record_plan, recorded_plan, recorded_profiles
from fofa_deploy.store import Store

DATA = {"name": "digits", "image_size": (16, 16), "channels": 1}
TRAINED = {"model": "timm:resnet10t", "fit": {"epochs": 1}}


def _plan(**changes: object) -> RunPlan:
    plain = {
        "name": "p", "targets": ["cpu-onnxruntime"], "data": DATA, "student": {"model": "timm:resnet10t"},
        "teacher": TRAINED, "distill": {"epochs": 1},
    }  # fmt: skip
    return RunPlan.model_validate(plain | changes)


def test_profiles_come_in_the_order_of_the_targets():
    plan = _plan(targets=["cpu-openvino", "cpu-onnxruntime"])
    assert [profile.name for profile in look_up(plan)] == ["cpu-openvino", "cpu-onnxruntime"]


def test_all_that_is_missing_is_told_at_once(tmp_path):
    plan = _plan(
        targets=["cpu-onxruntime", "cpu-openvino"],
        teacher=TRAINED | {"model": "timm:resnt18"},
        student={"model": "timm:resnet10t", "checkpoint": tmp_path / "gone.safetensors"},
    )
    with pytest.raises(PlanError) as caught:
        look_up(plan)
    for words in ("'cpu-onxruntime'", "did you mean 'cpu-onnxruntime'", "'resnt18'", "gone.safetensors does not exist"):
        assert words in caught.value.message


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        ({"student": {"model": "timm:resnt10t"}}, ModelError, "resnt10t"),
        (
            {"student": {"model": "auto"}, "select": {"candidates": [{"model": "timm:no_such_*"}]}},
            PlanError,
            "no timm model matches",
        ),
        ({"targets": ["cpu-openvino", "cpu-openvino"]}, PlanError, "the same name"),
    ],
)
def test_a_single_mistake_is_told_as_it_is(changes, kind, words):
    with pytest.raises(kind) as caught:
        look_up(_plan(**changes))
    assert words in caught.value.message + caught.value.action


def test_every_misspelt_candidate_is_told():
    candidates = [{"model": "timm:resnt18"}, {"model": "timm:resnet10t"}, {"model": "timm:resnt34"}]
    with pytest.raises(UserError) as caught:
        look_up(_plan(student={"model": "auto"}, select={"candidates": candidates}))
    assert "'resnt18'" in caught.value.message
    assert "'resnt34'" in caught.value.message


@pytest.mark.parametrize(
    ("student", "problem", "action"),
    [
        ({"model": "timm:resnet10t.a1_in1k"}, "no weights 'resnet10t.a1_in1k'", "resnet10t.c3_in1k"),
        ({"model": "timm:botnet50ts_256", "pretrained": True}, "no pretrained weights for 'botnet50ts_256'", "checkpoint"),
    ],
)
def test_weights_that_timm_does_not_have_are_told(student, problem, action):
    with pytest.raises(ModelError, match=problem) as caught:
        look_up(_plan(student=student))
    assert action in caught.value.action


def test_nothing_that_is_missing_hides_another(tmp_path):
    candidates = [{"model": "timm:no_such_*"}, {"model": "timm:resnet10t"}, {"model": "timm:resnet10t"}, {"model": "timm:resnt34"}]
    plan = _plan(
        targets=["cpu-onxruntime"],
        teacher=TRAINED | {"model": "timm:resnt18"},
        student={"model": "auto"},
        select={"candidates": candidates},
    )
    with pytest.raises(PlanError) as caught:
        look_up(plan)
    for words in ("'cpu-onxruntime'", "'resnt18'", "'no_such_*'", "'resnt34'"):
        assert words in caught.value.message


def test_two_lines_that_come_to_the_same_are_told():
    lines = [{"model": "timm:resnet10t"}] * 2
    with pytest.raises(PlanError, match="two candidates"):
        look_up(_plan(student={"model": "auto"}, select={"candidates": lines}))


def test_what_a_module_prints_does_not_reach_standard_output(tmp_path, monkeypatch, capsys):
    (tmp_path / "talkative.py").write_text("print('hello')\n\ndef net(num_classes, in_chans): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    look_up(_plan(student={"model": "talkative:net"}))
    assert capsys.readouterr().out == ""


def test_a_finished_run_needs_its_profiles_alone(tmp_path):
    plan = _plan(student={"model": "timm:gone"})
    assert [profile.name for profile in recorded_profiles(tmp_path, plan)] == ["cpu-onnxruntime"]


def test_a_profile_is_recorded_with_the_run(tmp_path):
    """A run directory may be carried to where the file is not; where it is, it is the one that counts."""
    file, plan = tmp_path / "board.toml", _plan(targets=[str(tmp_path / "board.toml")])
    told = 'name = "board"\ndescription = "{}"\nruntime = "onnxruntime"\nprecisions = ["fp32"]\n'
    file.write_text(told.format("as it was"))
    with Store(tmp_path / "run") as store:
        record_plan(store, plan, look_up(plan), force=False)
    file.write_text(told.format("as it is"))
    assert recorded_profiles(tmp_path / "run", plan)[0].description == "as it is"
    file.unlink()
    assert recorded_profiles(tmp_path / "run", plan)[0].description == "as it was"
    for damage in ("{", "5", "[1]", '{"a": 1}', "[" * 5000):
        (tmp_path / "run" / PROFILES).write_text(damage)
        with pytest.raises(PlanError, match=PROFILES):
            recorded_profiles(tmp_path / "run", plan)


def test_names_of_old_and_patterns_may_have_weights():
    """Which is found when the network is made; another match of the pattern has them."""
    assert look_up(_plan(student={"model": "timm:tf_efficientnet_b0_ns", "pretrained": True}))
    assert look_up(_plan(student={"model": "auto"}, select={"candidates": [{"model": "timm:mobilenetv3_*", "pretrained": True}]}))


def test_a_dry_run_looks_them_up(tmp_path):
    done = run_cli("compress-and-export", "demo", "--dry-run", "--set", "student.model=timm:resnt18", cwd=tmp_path)
    assert done.returncode == 2
    assert "resnt18" in done.stderr
    assert done.stdout == ""


def test_how_a_training_gets_on_may_change_from_one_start_to_the_next(tmp_path):
    def plan(fit: dict, floor: float, **distill):
        teacher = {"model": "timm:resnet18", "fit": {"epochs": 2, **fit}, "floor_top1": floor}
        return _plan(student={"model": "timm:resnet18"}, teacher=teacher, distill={"epochs": 2, **distill})

    with Store(tmp_path / "run") as store:
        record_plan(store, before := plan({}, 0.5), look_up(before), force=False)
        (tmp_path / "run" / "student").mkdir()
        (tmp_path / "run" / "student" / "manifest.json").write_text("{}")
    manner = {"workers": 3, "trackers": ["tensorboard"], "checkpoint_seconds": 5.0}
    with Store(tmp_path / "run") as store:
        record_plan(store, after := plan(manner, 0.4, shard_teacher=True, **manner), look_up(after), force=False)
        assert recorded_plan(tmp_path / "run") == after
        with pytest.raises(PlanError, match=r"teacher\.fit\.lr was 0\.001, is 0\.1"):
            record_plan(store, plan({"lr": 0.1}, 0.5), [], force=False)
