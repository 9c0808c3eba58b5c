"""The benchmark of all families: a trial passes where all is well, and each of its checks can fail."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parent.parent / "benchmarks" / "zoo-distill"
sys.path.insert(0, str(FOLDER))
import trial  # noqa: E402 - from the benchmark's folder


@pytest.fixture(scope="module")
def zoo():
    return trial.Zoo(trial.Rules(ignored_prefix="test_"))


@pytest.mark.parametrize("role", ["as_teacher", "as_student", "non_square"])
def test_a_family_passes_its_trials(zoo, role):
    candidate = zoo.candidate("lcnet_035", {})
    assert (candidate.side, candidate.sized) == (64, False)
    outcome = zoo.attempt(role, candidate.model_dump())
    assert outcome.problems == ()
    assert len(outcome.stages) == 4
    assert all(stage.prompt for stage in outcome.stages)


def test_the_smallest_of_a_family_is_a_classifier(zoo):
    assert zoo.smallest("gemma4_vit").name == "gemma4_vit_167m"  # gemma4_vit_167m_enc has no head, so it is smaller


@pytest.fixture
def watch():
    shape = (3, 64, 64)
    return trial._Watch(trial._objective(trial._tapped("lcnet_035", shape), trial._tapped("starnet_s050", shape)))


def test_the_checks_notice(watch):
    watch.frozen()
    assert watch.problems == []
    teacher = watch.objective.teacher.model
    teacher.head.bias.data += 1
    teacher.train()
    teacher.register_forward_hook(lambda *_: None)
    watch.frozen()
    assert watch.problems == ["the teacher left eval mode", "the teacher's state changed", "hooks are left"]


def test_an_open_prompt_and_an_untrained_tensor_are_noticed(watch):
    for prompt in watch.objective.terms["fofa"].prompts.values():
        torch.nn.init.constant_(prompt.b, 5.0)
    watch.identity(torch.randn(2, 3, 64, 64))
    assert watch.problems[0].startswith("prompted - plain at b = 0")
    watch.trained({name: p.detach().clone() for name, p in watch.objective.student.model.named_parameters()}, {"conv_stem.weight"})
    assert "1 of " in watch.problems[1]


def test_the_page_is_the_record():
    specification = importlib.util.spec_from_file_location("zoo_run", FOLDER / "run.py")
    run = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(run)
    assert run.page(json.loads(run.RESULTS.read_text())) == (FOLDER / "README.md").read_text()
