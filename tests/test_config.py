"""Plans: every mistake at once, nothing repaired; the same plan means the same everywhere."""

import json

import pytest
from tiny import run_cli

from fofa_deploy.config import DistillPlan, RunPlan, embedded_plans, load_plan, ready_made
from fofa_deploy.errors import PlanError
from fofa_deploy.schema import validate

GOOD = """
name = "try"
targets = ["cpu-onnxruntime"]
[data]
name = "digits"
[student]
model = "timm:resnet10t"
[distill]
method = "none"
"""
FIVE = """
name = "try"
targets = ["cpu-onnxruntime"]
sed = 1
[data]
name = "digits"
chanels = 1
[student]
model = "timm:resnet10t"
pretraind = true
[distill]
method = "none"
epochs = "20"
[distill.fofa]
head = 4
"""
NAMES = ("'seed'", "'channels'", "'pretrained'", "distill.epochs: expected a whole number", "'heads'")


def plan(tmp_path, text=GOOD, name="plan.toml"):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return str(path)


def problem(tmp_path, text="", overrides=()) -> str:
    with pytest.raises(PlanError) as caught:
        load_plan(plan(tmp_path, GOOD + text), overrides)
    return caught.value.message


def test_five_mistakes_are_named_at_once(tmp_path):
    with pytest.raises(PlanError) as caught:
        load_plan(plan(tmp_path, FIVE))
    first, *lines = caught.value.message.splitlines()
    assert first.endswith("has 5 mistakes:")
    assert len(lines) == 5
    for line, name in zip(lines, NAMES, strict=True):
        assert name in line
    assert "nothing was run" in caught.value.action


def test_five_mistakes_through_the_command_line(tmp_path):
    done = run_cli("compress-and-export", plan(tmp_path, FIVE), "--out", tmp_path / "run")
    assert done.returncode == 2
    assert done.stdout == ""
    for name in NAMES:
        assert name in done.stderr
    assert not (tmp_path / "run").exists()


def test_overrides_are_typed(tmp_path):
    values = ("distill.epochs=7", "distill.lr = 1e-4", "name=again", "data.flip=true", "data.mean=[0.1]", "budget.p90_ms=2")
    resolved = load_plan(plan(tmp_path), values)
    assert (resolved.distill.epochs, resolved.distill.lr, resolved.name) == (7, 1e-4, "again")
    assert (resolved.data.flip, resolved.data.mean, resolved.budget.p90_ms) == (True, (0.1,), 2.0)


def test_the_last_override_wins(tmp_path):
    assert load_plan(plan(tmp_path), ("seed=1", "seed=2")).seed == 2


@pytest.mark.parametrize("assignment", ["epochs", "=3", "", "distill.=3", "name.first=x", "targets.first=x"])
def test_an_override_that_cannot_be_read_is_refused(tmp_path, assignment):
    with pytest.raises(PlanError):
        load_plan(plan(tmp_path), (assignment,))


def test_a_misspelt_override_is_a_mistake_like_any_other(tmp_path):
    assert "did you mean 'epochs'?" in problem(tmp_path, overrides=("distill.epoch=3",))


def test_a_number_too_long_to_read_is_a_mistake(tmp_path):
    assert "seed: expected a whole number" in problem(tmp_path, overrides=("seed=" + "9" * 5000,))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("distill.method=kd",), "method 'kd' needs a [teacher]"),
        (("distill.method=kd", "teacher.model=timm:resnet18"), "neither weights nor a [teacher.fit] table"),
        (("distill.method=fofo",), "unknown method 'fofo'"),
        (("distill.fofa.regions=5",), "regions must be a square number"),
        (("distill.epochs=2", "distill.warmup_epochs=2.5"), "warmup_epochs (2.5) must not exceed epochs (2)"),
        (("distill.fofa.emphasis_power=1.5",), "distill.fofa.emphasis_power"),
        (("distill.fofa.heads=7",), "must be a multiple of heads (7)"),
        (("distill.fofa.stages=2", "distill.fofa.prompted_stages=[3]"), "prompted_stages must lie between 1 and stages (2)"),
        (("distill.fofa.prompted_stages=[0]",), "prompted_stages must lie between 1 and stages (4), or count back from -1"),
        (("distill.fofa.path='side'", "distill.weights.anchor=1.0"), "with fofa.path 'side' no teacher is prompted"),
        (("distill.fofa={path='side',prompt_share=0.5}",), "leave out weights.anchor and supervision, and prompt_share"),
        (("distill.fofa.prompted_stages=[-5]",), "prompted_stages must lie between 1 and stages (4), or count back from -1"),
        (('required=["cpu-openvino"]',), "not in targets: cpu-openvino"),
        (("targets=[]",), "targets: must not be empty"),
        (("data.mean=[0.5, 0.5]",), "mean takes 1 or 3 numbers"),
        (("data.std=[0]",), "data.std[0]: must be greater than 0"),
        (("data.name=images",), "set data.classes"),
        (("data.name=images", "data.classes=3"), "not train one"),
        (("accuracy.max_top1_drop=nan",), "accuracy.max_top1_drop"),
        (("distill.lr=inf",), "distill.lr"),
        (("name=../elsewhere",), "does not match"),
    ],
)
def test_a_plan_that_makes_no_sense_says_why(tmp_path, overrides, words):
    assert words in problem(tmp_path, overrides=overrides)


def test_two_problems_of_the_whole_plan_are_told_together(tmp_path):
    message = problem(tmp_path, overrides=("distill.method=kd", 'required=["cpu-openvino"]'))
    assert "needs a [teacher]" in message
    assert "required names targets" in message


def test_without_a_way_to_get_weights_there_is_no_run(tmp_path):
    with pytest.raises(PlanError, match="neither weights nor a"):
        load_plan(plan(tmp_path, GOOD.partition("[distill]")[0]))


@pytest.mark.parametrize("name", embedded_plans())
def test_embedded_plans_load(name):
    assert load_plan(name).name == name


def test_the_demo_distills_across_families():
    demo = load_plan("demo")
    assert demo.distill.terms == ("fofa", "rsd", "dist")
    assert set(demo.required) <= set(demo.targets)


def test_a_plan_that_is_not_there_names_the_embedded_ones():
    with pytest.raises(PlanError, match="there is no plan 'dmeo'") as caught:
        load_plan("dmeo")
    assert "demo" in caught.value.action


def test_relative_paths_are_the_plans_own(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    text = GOOD.replace('["cpu-onnxruntime"]', '["cpu-onnxruntime", "board.toml"]').replace('"digits"', '"idx"\nroot = "images"')
    text = text.replace('"timm:resnet10t"', '"timm:resnet10t"\ncheckpoint = "weights/a.safetensors"')
    resolved = load_plan(plan(tmp_path, text, "plans/plan.toml"), ('required=["here.toml"]', 'targets=["here.toml"]'))
    assert resolved.data.root == tmp_path / "plans" / "images"
    assert resolved.student.checkpoint == tmp_path / "plans" / "weights" / "a.safetensors"

    assert resolved.targets == (str(tmp_path / "elsewhere" / "here.toml"),)  # what is typed is relative to where it is typed
    unchanged = load_plan(str(tmp_path / "plans" / "plan.toml"))
    assert unchanged.targets == ("cpu-onnxruntime", str(tmp_path / "plans" / "board.toml"))


def test_a_candidates_weights_lie_beside_the_plan_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ["student={model='auto'}", "select.candidates=[{model='timm:resnet18',checkpoint='b.safetensors'}]"]
    assert load_plan("demo", options).select.candidates[0].checkpoint == tmp_path / "b.safetensors"


def test_the_resolved_plan_is_a_plan(tmp_path):
    resolved = load_plan("demo", ("seed=3", "data.root=somewhere", "data.image_size=[16, 24]"))
    path = tmp_path / "plan.json"
    path.write_text(resolved.model_dump_json(indent=1))
    assert load_plan(str(path)) == resolved == RunPlan.model_validate_json(path.read_bytes())
    assert load_plan(str(path), ("seed=4",)).seed == 4


@pytest.mark.parametrize("content", ["{", "[1]", "null", '{"name": NaN}', '{"seed": "1"}'])
def test_a_damaged_plan_json_is_refused(tmp_path, content):
    with pytest.raises(PlanError):
        load_plan(plan(tmp_path, content, "plan.json"))


def test_dry_run_prints_the_resolved_plan_and_makes_nothing(tmp_path):
    done = run_cli("compress-and-export", "demo", "--dry-run", "--set", "seed=5", "--out", "run", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert RunPlan.model_validate_json(done.stdout) == load_plan("demo", ("seed=5",))
    assert json.loads(done.stdout)["measure"]["seconds"] == 3.0  # defaults are spelt out
    assert list(tmp_path.iterdir()) == []


def test_a_ready_made_model_needs_no_training(tmp_path):
    made = ready_made(tmp_path / "w.safetensors", "timm:resnet10t", 7, tmp_path, ("data.image_size=32",))
    assert (made.distill, made.data.classes, made.data.image_size, made.data.labelled) == (None, 7, (32, 32), False)


@pytest.mark.parametrize(
    "assignment",
    [f"seed={1 << 64}", "limits.run_seconds=1e10", "name=" + "x" * 3000, "data.root='~no-such-user/x'", "seed=" + "[" * 5000],
)
def test_what_no_machine_could_use_is_a_mistake(assignment):
    with pytest.raises(PlanError):
        load_plan("demo", [assignment])


def test_text_that_is_none_is_told_as_what_it_is(tmp_path):
    (tmp_path / "plan.json").write_text('{"name": "\\ud800"}')
    with pytest.raises(PlanError, match="characters that are none"):
        load_plan(str(tmp_path / "plan.json"))


NO_PROMPTS = {"prompted_stages": [], "feedback": True}


@pytest.mark.parametrize(
    ("plan", "idle"),
    [
        ({}, {}),
        ({"method": "none"}, {}),
        ({"method": "kd", "temperature": 4.0, "features_until": 1.0}, {"features_until": "method = 'kd'"}),
        ({"method": "dist", "fofa": {"width": 64}, "weights": {"rsd": 2.0}}, {"fofa.width": "method", "weights.rsd": "method"}),
        (
            {"fofa": NO_PROMPTS, "weights": {"anchor": 1.0}},
            {"weights.anchor": "prompted_stages = []", "fofa.feedback": "prompted_stages = []"},
        ),
        ({"fofa": {"prompted_stages": [-1], "feedback": True, "fusion": "dense"}, "weights": {"anchor": 1.0}}, {}),
        ({"fofa": {"fusion": "dense"}}, {"fofa.fusion": "feedback = false"}),
        ({"method": "fitnet", "fofa": {"stages": 2, "regions": 4}}, {"fofa.regions": "method = 'fitnet'"}),
        ({"balance": "fixed", "balance_every": 7}, {"balance_every": "balance = 'fixed'"}),
        ({"fofa": {"emphasis_power": 0.1}}, {"fofa.emphasis_power": "emphasis = 'none'"}),
    ],
)
def test_what_has_no_effect_is_named_with_the_reason(plan, idle):
    found = validate(plan, DistillPlan, "test").idle
    assert found.keys() == idle.keys()
    assert all(reason in found[key] for key, reason in idle.items())


def test_a_loss_without_any_weight_is_refused():
    with pytest.raises(PlanError, match="all weights of the loss are 0"):
        validate({"method": "kd", "weights": {"ce": 0.0, "kd": 0.0}}, DistillPlan, "test")
    assert validate({"method": "kd", "weights": {"ce": 0.0}}, DistillPlan, "test")
