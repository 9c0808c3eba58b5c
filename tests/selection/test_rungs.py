"""What a short training of a candidate is made from."""

import sys
from types import SimpleNamespace

import pytest

from fofa_deploy.config import ModelPlan, load_plan
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
