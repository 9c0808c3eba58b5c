"""A plan with five mistakes names all five, each with the nearest valid name."""

import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from fofa_deploy.errors import PlanError
from fofa_deploy.schema import MAX_BYTES, parse_toml, read_tables, read_toml, validate
from fofa_deploy.types import Frozen, Precision, Scalar


class Kd(Frozen):
    method: Literal["kd"]
    temperature: PositiveFloat = 1.0


class Fofa(Frozen):
    method: Literal["fofa"]
    regions: PositiveInt = 64


class Images(Frozen):
    source: str = Field(description="a timm data set or a folder")
    root: Path | None = None


class Target(Frozen):
    profile: str
    precisions: tuple[Precision, ...] = ()


class Plan(Frozen):
    name: str = "run"
    epochs: PositiveInt = 10
    lr: PositiveFloat = 0.1
    data: Images
    distill: Annotated[Kd | Fofa, Field(discriminator="method")] | None = None
    targets: tuple[Target, ...] = Field(default=(), max_length=3)
    options: dict[str, Scalar] = Field(default={})
    student: str | Images = "resnet18"

    @model_validator(mode="after")
    def _short(self):
        if self.epochs > 1000:
            raise ValueError("epochs and patience do not fit together")
        return self


GOOD = """
epochs = 3
lr = 1
student = "resnet18"
data = { source = "folder", root = "images/ä b" }
distill = { method = "fofa", regions = 16 }
targets = [{ profile = "cpu", precisions = ["fp32", "int8"] }, { profile = "npu" }]
[options]
depth = 3
ratio = 0.5
fast = true
name = "x"
"""


def mistakes(text: str, model=Plan) -> list[str]:
    with pytest.raises(PlanError) as caught:
        parse_toml(text, model, "plan.toml")
    head, *lines = caught.value.message.splitlines()
    assert head.startswith("plan.toml ")
    assert "plan.toml" in caught.value.action
    return [line.strip() for line in lines]


def mistake(text: str, model=Plan) -> str:
    (line,) = mistakes(f'data.source = "folder"\n{text}' if "data" not in text else text, model)
    return line


def test_a_right_plan_keeps_every_value():
    plan = parse_toml(GOOD, Plan, "plan.toml")
    assert plan.data == Images(source="folder", root=Path("images/ä b"))
    assert plan.distill == Fofa(method="fofa", regions=16)
    assert [t.precisions for t in plan.targets] == [(Precision.FP32, Precision.INT8), ()]
    assert plan.options == {"depth": 3, "ratio": 0.5, "fast": True, "name": "x"}
    assert plan.lr == 1.0


def test_five_mistakes_are_reported_at_once_in_the_order_of_the_file():
    text = """
    epoch = 3
    lr = "fast"
    targets = [{ profile = "cpu", precisions = ["fp61"] }]
    [data]
    sorce = "folder"
    [distill]
    method = "foofa"
    """
    assert mistakes(text) == [
        "epoch: unknown key; did you mean 'epochs'?",
        'lr: expected a number, got "fast"',
        'targets[0].precisions[0]: unknown value "fp61"; did you mean "fp16"? (valid: fp32, fp16, bf16, int8)',
        "data.sorce: unknown key; did you mean 'source'?",
        'distill.method: unknown value "foofa"; did you mean "fofa"? (valid: kd, fofa)',
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("distill = { method = 'fofa', region = 3 }", "distill.region: unknown key; did you mean 'regions'?"),
        ("distill = { method = 'kd', regions = 3 }", "distill.regions: unknown key; valid here: method, temperature"),
        ("distill = {}", "distill.method: missing; it says which kind of table this is"),
        ("regions = 3", "regions: unknown key; did you mean 'distill.regions'?"),
        ("Epochs = 3", "Epochs: unknown key; did you mean 'epochs'?"),
        ("epochs = '20'", 'epochs: expected a whole number, got "20"'),
        ("epochs = 2.5", "epochs: expected a whole number, got 2.5"),
        ("epochs = true", "epochs: expected a whole number, got true"),
        ("epochs = 0", "epochs: must be greater than 0, got 0"),
        ("epochs = 2000", "the whole file: epochs and patience do not fit together"),
        ("lr = nan", "lr: must be a finite number, got nan"),
        ("lr = inf", "lr: must be a finite number, got inf"),
        ("name = [1]", "name: expected a string, got an array"),
        ("targets = 1", "targets: expected an array, got 1"),
        ("targets = [{ profile = 'a' }, { profle = 'b' }]", "targets[1].profle: unknown key; did you mean 'profile'?"),
        ("targets = [{}]", "targets[0].profile: missing, and has no default"),
        ("targets = [1]", "targets[0]: expected a table, got 1"),
        ("options.a = [1]", "options.a: expected true or false, a whole number, a number or a string, got an array"),
        ("student = 3", "student: expected a string or a table, got 3"),
        ("student = { root = 'x' }", "student.source: missing, and has no default: a timm data set or a folder"),
        ("data = { }", "data.source: missing, and has no default: a timm data set or a folder"),
        ("data = { root = 3, source = 'x' }", "data.root: expected a string, got 3"),
        ("data = 'folder'", 'data: expected a table, got "folder"'),
    ],
)
def test_each_mistake_has_one_line(text, expected):
    assert mistake(text) == expected


def test_a_misspelt_required_key_is_one_mistake_and_not_also_a_missing_one():
    assert mistakes("data = { sorce = 'x' }") == ["data.sorce: unknown key; did you mean 'source'?"]


def test_an_unknown_key_is_never_used():
    with pytest.raises(PlanError, match="epoch: unknown key"):
        validate({"epoch": 3, "data": {"source": "x"}}, Plan, "--set")


def test_keys_and_values_cannot_steer_the_terminal():
    (line, *_) = mistakes('"\\u001b[31m\\nred" = 1\ndata.source = "x"')
    assert line.startswith('"\\u001b[31m\\nred": unknown key')
    assert "\\u001b" in mistake('epochs = "\\u001b[2J"')


def test_a_flood_of_mistakes_is_cut_short():
    lines = mistakes("data.source = 'x'\n" + "\n".join(f"zzz{n} = 1" for n in range(100)))
    assert len(lines) == 26
    assert lines[-1] == "and 75 more"


def test_a_syntax_error_shows_its_line():
    with pytest.raises(PlanError) as caught:
        parse_toml('name = "a"\nname = "b"', Plan, "plan.toml")
    assert "line 2" in caught.value.message
    assert '2 | name = "b"' in caught.value.message


@pytest.mark.parametrize(
    "text",
    [
        "a = " + "[" * 9000,
        "a." * 20000 + "b = 1",
        "epochs = " + "9" * 5000,
        "epochs = " + "9" * 400,
        "x" * (MAX_BYTES + 1),
        "\ud800",
        "\0",
    ],
    ids=["arrays", "dotted", "digits", "int", "large", "surrogate", "nul"],
)
def test_hostile_text_is_refused_quickly(text):
    start = time.monotonic()
    with pytest.raises(PlanError):
        parse_toml(text, Plan, "plan.toml")
    assert time.monotonic() - start < 2


def test_a_file_is_named_in_every_refusal(tmp_path):
    latin, large, missing = tmp_path / "latin.toml", tmp_path / "large.toml", tmp_path / "missing.toml"
    latin.write_bytes(b'name = "\xe4"')
    large.write_bytes(b"#" * (MAX_BYTES + 1))
    for path, words in ((latin, "not UTF-8"), (large, "larger than 64 KiB"), (missing, "No such file"), (tmp_path, "directory")):
        with pytest.raises(PlanError, match=words) as caught:
            read_toml(path, Plan)
        assert str(path) in caught.value.message


def test_tables_are_read_without_a_model(tmp_path):
    (tmp_path / "plan.toml").write_text(GOOD)
    assert read_tables(tmp_path / "plan.toml")["distill"] == {"method": "fofa", "regions": 16}


def test_no_framework_is_imported():
    load = "import sys, fofa_deploy.profile as p; p.installed_profiles()"
    code = f"{load}; print({{'torch', 'onnxruntime', 'openvino', 'numpy'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
