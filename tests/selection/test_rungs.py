"""What a short training of a candidate is made from."""

import sys
from types import SimpleNamespace

import pytest

from fofa_deploy.config import ModelPlan, load_plan
from fofa_deploy.errors import TrainingError
from fofa_deploy.select.candidates import Candidate, code_of
from fofa_deploy.select.rungs import Halving, Rung
from fofa_deploy.store import digest


@pytest.fixture
def network(tmp_path, monkeypatch):
    """The file of a candidate's network, which is its user's own."""
    file = tmp_path / "a_users_network.py"
    file.write_text("def net(num_classes, in_chans):\n    ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield file
    sys.modules.pop(file.stem, None)


def test_a_changed_network_is_trained_and_chosen_anew(network):
    plan = load_plan("demo", ["student={model='auto'}", f"select.candidates=[{{model='{network.stem}:net'}}]"])
    told = []

    class SeenError(Exception):
        """The stage's inputs are all that is asked for."""

    def stage(name, inputs, work):
        told.append(digest(inputs))
        raise SeenError

    halving = Halving(plan.select, plan.distill, SimpleNamespace(), None, stage, {})
    one = Candidate(name="own-8", student=ModelPlan(model=f"{network.stem}:net"), image_size=(8, 8))
    chosen_from = []
    for text in ("", "", "# mended\n"):
        network.write_text(network.read_text() + text)
        with pytest.raises(SeenError):
            halving._score(one, Rung(1, 10, 1))
        chosen_from.append(digest(code_of(plan.select, None)))
    for before, same, after in (told, chosen_from):
        assert before == same != after


class Trained(Halving):
    """Scores as a test says; an error in place of one is raised."""

    def _score(self, candidate, rung):
        self.alike.setdefault(candidate.name, 0)
        self.alike[candidate.name] += 1
        score = SCORES[candidate.name]
        if isinstance(score, list):
            score = score[rung.number - 1]
        if isinstance(score, Exception):
            raise score
        return score


LOST = TrainingError("its loss is no number", "lower lr")
SCORES = {"good": 0.9, "poor": 0.2, "broken": LOST, "late": [0.95, LOST]}


def halving(rungs=3):
    plan = load_plan("demo", ["student={model='auto'}", f"select.rungs={rungs}"])
    shop = SimpleNamespace(data=SimpleNamespace(train=range(1000)))
    return Trained(plan.select, plan.distill, shop, None, None, {})


def those(*names):
    return [Candidate(name=name, student=ModelPlan(model="timm:resnet18"), image_size=(8, 8)) for name in names]


@pytest.mark.parametrize(("names", "rival", "points"), [(["good"], False, 1), (["good"], True, 3), (["good", "poor"], True, 3)])
def test_the_last_one_left_climbs_on_where_somebody_waits_at_the_top(names, rival, points):
    """One point of a short training foretells nothing to be compared with a finished one."""
    assert len(halving().climb(those(*names), rival)["good"].points) == points


def test_one_that_cannot_be_trained_takes_nobody_along():
    search = halving()
    assert set(search.climb(those("good", "broken", "poor"))) == {"good", "poor"}
    assert search.faults == {"broken": "its loss is no number"}
    assert search.alike["broken"] == 1
    with pytest.raises(TrainingError, match="no candidate can be trained: broken: its loss is no number"):
        halving().climb(those("broken"))


def test_where_the_last_ones_fail_those_that_were_dropped_before_them_are_judged():
    search = halving()
    found = search.climb(those("late", "poor"), rival=True)
    assert {name: len(curve.points) for name, curve in found.items()} == {"poor": 1}
    assert search.faults == {"late": "its loss is no number"}


def test_a_rival_stands_where_nobody_can_be_trained():
    assert halving().climb(those("broken"), rival=True) == {}
