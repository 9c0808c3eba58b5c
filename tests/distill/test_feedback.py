"""Every form of feedback: what it changes, what it leaves alone, and that each step trains every part of it."""

from contextlib import nullcontext

import pytest
import torch
from test_objective import open_prompts, step

from fofa_deploy.config import FofaPlan

FORMS = {
    "default": {name: FofaPlan().model_dump()[name] for name in ("prompted_stages", "feedback", "prompt_share")},
    "dense fusion": {"fusion": "dense"},
    "no gap": {"feedback": False},
    "late": {"prompted_stages": (3, 4)},
    "side": {"path": "side"},
    "half of the batch": {"prompt_share": 0.5},
    "every second step": {"prompt_every": 2},
    "blind to the feature loss": {"follow": 0.0},
    "hard regions": {"prompted_stages": (), "emphasis": "regions"},
    "hard channels": {"prompted_stages": (), "emphasis": "channels"},
    "easy samples": {"prompted_stages": (), "emphasis": "samples", "emphasis_power": -1.0},
    "no attention": {"prompted_stages": (), "attention": False},
}


def teacher_runs(made):
    runs = []
    made.teacher.model.register_forward_hook(lambda model, inputs, output: runs.append(len(inputs[0])))
    return runs


@pytest.mark.parametrize("form", FORMS)
def test_every_form_trains_all_its_parts_and_leaves_the_teacher_alone(form, objective, batch):
    held = {} if form == "side" else {"anchor": 1.0, "supervision": 1.0}
    made = objective(fofa=FORMS[form], weights=held).train()
    before = {name: value.clone() for name, value in made.teacher.state_dict().items()}
    optimizer = torch.optim.AdamW(made.parameter_groups(1e-3, 0.05))
    for seed in range(3):
        assert step(made, batch(seed=seed), optimizer).total.isfinite()
        untaught = [name for name, parameter in made.named_parameters() if parameter.grad is None]
        assert all(".prompts." in name for name in untaught), "on some steps prompts may rest, and nothing else"
    assert not untaught
    assert all(torch.equal(value, before[name]) for name, value in made.teacher.state_dict().items())


@pytest.mark.parametrize("form", ["default", "side", "half of the batch", "every second step", "late", "blind to the feature loss"])
def test_at_its_start_a_prompt_changes_no_loss(form, objective, batch):
    prompted, plain = objective(fofa=FORMS[form]).eval(), objective(fofa={"prompted_stages": ()}).eval()
    plain.load_state_dict({name: value for name, value in prompted.state_dict().items() if ".prompts." not in name})
    one, other = prompted(*batch()).terms, plain(*batch()).terms
    assert torch.allclose(one["fofa"], other["fofa"], rtol=1e-4)
    assert float(one["regularizer"]) == pytest.approx(0, abs=1e-6)


def test_a_prompt_on_the_side_needs_no_second_pass(objective, batch):
    made = open_prompts(objective(fofa={"path": "side"})).train()
    runs = teacher_runs(made)
    terms = made(*batch()).terms
    assert len(runs) == 1
    assert terms["regularizer"] > 0  # features are held to the plain teacher's: there are no prompted logits
    told = made.diagnostics(*batch())
    assert told["teacher_correct"] == told["prompted_correct"]


def test_a_share_of_the_batch_is_prompted(objective, batch):
    made = objective(fofa={"prompt_share": 0.5}).train()
    made(*batch(count=4))  # the first step also probes what both passes share
    runs = teacher_runs(made)
    made(*batch(count=5))
    assert runs == [5, 3]


def test_a_share_is_never_one_image(objective, batch):
    made = objective(fofa={"prompt_share": 0.25}).train()
    runs = teacher_runs(made)
    made(*batch(count=4))
    assert runs[-1] == 2


def test_passes_that_share_a_step_are_prompted_alike(objective, batch):
    made = objective(fofa={"prompt_every": 2}, accumulate=2).train()
    made(*batch())
    runs = teacher_runs(made)
    counts = []
    for _ in range(5):
        before = len(runs)
        made(*batch())
        counts.append(len(runs) - before)
    assert counts == [2, 1, 1, 2, 2]  # the second pass of a prompted step, a step without, a prompted step


def test_the_share_is_taught_as_it_would_be_alone(objective, batch, monkeypatch):
    images, labels = batch(count=5)
    made = open_prompts(objective(fofa={"prompt_share": 0.5, "prompted_stages": [4]}), 0.5).eval()
    shared = made(images, labels).terms
    assert made._prefix.names
    monkeypatch.setattr(type(made), "_recording", lambda self, images: nullcontext())
    made._prefix = None
    assert {name: float(term) for name, term in made(images, labels).terms.items()} == pytest.approx(
        {name: float(term) for name, term in shared.items()}, rel=1e-4
    )


def test_prompts_on_every_second_step_keep_count_in_the_checkpoint(objective, batch):
    made = objective(fofa={"prompt_every": 2}).train()
    made(*batch())
    runs = teacher_runs(made)
    other = objective(fofa={"prompt_every": 2}).train()
    other.load_state_dict(made.state_dict())
    theirs = teacher_runs(other)
    made(*batch())
    other(*batch())
    assert runs == theirs == [4]
    made(*batch())
    assert len(runs) == 3


def gradients(made, batch):
    made(*batch).total.backward()
    return [p.grad.clone() for p in made.terms["fofa"].prompts.parameters()]


def test_follow_scales_what_prompts_hear_of_the_feature_loss(objective, batch):
    weights = {"ce": 0.0, "kd": 0.0, "regularizer": 0.0}
    made = {share: open_prompts(objective(fofa={"follow": share}, weights=weights)).eval() for share in (0.0, 0.25, 1.0)}
    values = {share: float(one(*batch()).total.detach()) for share, one in made.items()}
    assert len(set(values.values())) == 1
    found = {share: gradients(one, batch()) for share, one in made.items()}
    assert not any(gradient.any() for gradient in found[0.0])
    for some, whole in zip(found[0.25], found[1.0], strict=True):
        assert torch.allclose(some, 0.25 * whole, rtol=1e-3, atol=1e-8)


def test_emphasis_moves_weight_and_keeps_its_sum():
    from fofa_deploy.distill.fofa import _difficulty

    aligned, target = torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4)
    target[0, :, 0, 0] = 3.0
    hard, easy = (_difficulty(aligned + 0.1, target, (1,), power) for power in (1.0, -1.0))
    assert hard.shape == (2, 1, 4, 4)
    for weight in (hard, easy):
        assert float(weight.mean()) == pytest.approx(1.0, rel=1e-5)
    assert hard[0, 0, 0, 0] == hard.max()
    assert easy[0, 0, 0, 0] == easy.min()


def test_an_anchor_and_supervision_are_terms_only_where_asked_for(objective, batch):
    assert set(objective().train()(*batch()).terms) == {"ce", "kd", "fofa", "regularizer"}
    asked = objective(weights={"anchor": 1.0, "supervision": 0.5}).train()(*batch()).terms
    assert {"anchor", "supervision"} <= set(asked)
    assert float(asked["anchor"]) == pytest.approx(0, abs=1e-6)  # b = 0
