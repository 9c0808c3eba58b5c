"""What a step costs: factors are of rounds that both forms took part in, however a measurement was interrupted and gone on with."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "distill-cost" / "run.py"
PAIR = "Swin-T -> ResNet18"


@pytest.fixture
def cost(monkeypatch):
    """The script, with steps that take known times, on a machine whose pace changes."""
    spec = importlib.util.spec_from_file_location("distill_cost", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "distill_cost", module)
    spec.loader.exec_module(module)
    module.pace = 1.0

    class Stepper:
        def __init__(self, pair: str, form, side: int) -> None:
            self.seconds = 1.0 if form.name == "KD" else 2.0 if form.goal else 1.5

        def step(self, measuring: bool = False) -> float:
            return self.seconds * module.pace

    monkeypatch.setattr(module, "Stepper", Stepper)
    monkeypatch.setattr(module, "_memory", lambda *_: 100)
    return module


def record(cost, file: Path):
    return cost.Record({"side": 32, "batch": 8, "threads": 1}, file, again=False)


def test_a_measurement_that_goes_on_at_another_pace_compares_what_was_side_by_side(cost, tmp_path):
    file = tmp_path / "results.json"
    cost._fill(record(cost, file), PAIR, 32, {"all": 4, "contested": 4})
    cost.pace = 3.0
    cost._fill(record(cost, file), PAIR, 32, {"all": 10, "contested": 4})
    rows = json.loads(file.read_text())["pairs"][PAIR]
    assert {len(row["all"]["steps"]) for row in rows.values()} == {10}
    assert {name for name, row in rows.items() if "contested" in row} == {"KD", *(f.name for f in cost.FORMS if f.goal)}
    for form in (form for form in cost.FORMS if form.every == 1):  # the others' kinds of step are not in the same rounds
        assert cost._factors(form.name, rows)[0] == pytest.approx(1.0 if form.name == "KD" else 2.0 if form.goal else 1.5)
        if form.goal:
            told = cost._goal(form, rows)
            assert "2.00 [2.00, 2.00]" in told
            assert ("met" if form.goal >= 2 else "**missed**") in told
    page = cost.page(json.loads(file.read_text()))
    assert "10 interleaved rounds of all forms, then 4 of KD and the forms with a goal" in page


def test_a_goal_within_what_other_rounds_would_have_given_is_open(cost):
    steps = [1.0, 1.1, 1.5, 1.6] * 3
    row = {"all": {"steps": steps, "measuring": []}, "bytes": 1}
    rows = {"KD": {"all": {"steps": [1.0] * 12, "measuring": []}, "bytes": 1}, cost.DEFAULT.name: row}
    assert "(**open**)" in cost._goal(cost.DEFAULT, rows)


def test_other_code_begins_the_record_anew(cost, tmp_path, monkeypatch):
    file = tmp_path / "results.json"
    cost._fill(record(cost, file), PAIR, 32, {"all": 1, "contested": 0})
    assert record(cost, file).rows(PAIR)
    monkeypatch.setattr(cost, "_code", lambda: "other")
    assert not record(cost, file).rows(PAIR)


def test_words_are_no_code(cost):
    plain = "def f(x: int) -> int:\n    return x + 1\n"
    told = '"""What it is."""\ndef f(x: int) -> int:\n    """More by one."""\n    # because\n    return x + 1\n'
    assert cost._wordless(plain) == cost._wordless(told)
    assert cost._wordless(plain) != cost._wordless(plain.replace("1", "2"))


def test_accuracy_is_of_seeds_that_all_pairs_have(cost, tmp_path, monkeypatch):
    found = {
        "default": {("a", 0): 0.80, ("b", 0): 0.90, ("a", 1): 0.81},
        "no prompt": {("a", 0): 0.79, ("b", 0): 0.90, ("a", 1): 0.5},
    }
    lines = [
        {"phase": "switch", "method": method, "pair": pair, "seed": seed, "validation": value}
        for method, scores in found.items()
        for (pair, seed), value in scores.items()
    ]
    lines += [{**lines[-1], "phase": "screen", "method": "other"}, {**lines[-1], "method": "half done"}]
    monkeypatch.setattr(cost, "ACCURACY", tmp_path / "results.jsonl")
    assert cost._worth() == {}
    cost.ACCURACY.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert cost._worth() == {"default": "0", "no prompt": "-0.50 (1)"}
