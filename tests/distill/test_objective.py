"""The loss of every method: what it sums, what it trains, what it leaves alone."""

import copy
from functools import partial

import pytest
import torch
from timm.layers import PatchDropout
from torch import nn

from fofa_deploy import training
from fofa_deploy.config import DistillPlan, WeightsPlan
from fofa_deploy.distill import losses as distances
from fofa_deploy.distill import objective as objectives
from fofa_deploy.distill.engine import _parts, compiled
from fofa_deploy.distill.grids import resize
from fofa_deploy.distill.lesson import Term
from fofa_deploy.distill.objective import Objective
from fofa_deploy.distill.taps import tap
from fofa_deploy.errors import ModelError

METHODS = {
    "none": {"ce"},
    "kd": {"ce", "kd"},
    "dkd": {"ce", "dkd"},
    "dist": {"ce", "dist"},
    "ofa": {"ce", "ofa"},
    "fitnet": {"ce", "kd", "fitnet"},
    "fofa+dist": {"ce", "dist", "fofa", "regularizer"},
    "rsd": {"ce", "kd", "rsd"},
    "fofa": {"ce", "kd", "fofa", "regularizer"},
    "fofa+rsd": {"ce", "kd", "fofa", "regularizer", "rsd"},
}
TEACHERS = ["cnn", "vit", "swin", "mixer", "mobilevit", "coat", "levit"]


@pytest.fixture
def compiling():
    """A part that is compiled ever again, and in the end no more, is an error."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield
    torch._dynamo.reset()


def open_prompts(objective, value=0.3):
    for prompt in objective.terms["fofa"].prompts.values():
        nn.init.constant_(prompt.b, value)
    return objective


def step(objective, batch, optimizer=None):
    optimizer = optimizer or torch.optim.AdamW(objective.parameter_groups(1e-3, 0.05))
    losses = objective(*batch)
    optimizer.zero_grad()
    losses.total.backward()
    optimizer.step()
    return losses


@pytest.mark.parametrize("method", METHODS)
def test_terms_and_weights(method, objective, batch):
    weights = {
        "ce": 0.5,
        "kd": 2.0,
        "fofa": 3.0,
        "regularizer": 0.25,
        "rsd": 0.125,
        "dkd": 2.0,
        "dist": 3.0,
        "ofa": 4.0,
        "fitnet": 5.0,
    }
    made = objective(teacher=None if method == "none" else "vit", method=method, weights=weights).train()
    losses = made(*batch())
    assert set(losses.terms) == METHODS[method]
    assert float(losses.total.detach()) == pytest.approx(
        sum(weights[name] * float(term) for name, term in losses.terms.items()), rel=1e-5
    )
    assert not any(term.requires_grad or term.ndim for term in losses.terms.values())
    assert losses.logits.shape == (4, 5)
    assert not losses.logits.requires_grad


@pytest.mark.parametrize("teacher", TEACHERS)
def test_the_prompted_teacher_starts_as_the_plain_one(teacher, objective, batch):
    student = "mobilevit" if teacher in ("mobilevit", "coat", "levit") else "cnn"
    made, (images, _) = objective(student, teacher).eval(), batch(teacher)
    assert len(made.terms["fofa"].prompts) == len(made.teacher.stages)
    with torch.no_grad():
        plain = made.teacher(images)
        targets = made.terms["fofa"].targets(plain)
        bent = made.teacher(images, made.terms["fofa"].bends(made.terms["fofa"].align(made.student(images), targets), targets))
    for one, other in zip([bent.logits, *bent.maps], [plain.logits, *plain.maps], strict=True):
        assert (one - other).norm() <= 1e-6 * other.norm()


@pytest.mark.parametrize("method", ["fofa", "fofa+rsd", "rsd", "kd", "ofa", "fitnet", "dkd", "dist"])
def test_gradients_reach_exactly_what_is_trained(method, objective, batch):
    made = objective(method=method).train()
    if "fofa" in method:
        open_prompts(made)
    made(*batch()).total.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in made.parameters())
    silent = [name for name, p in made.named_parameters() if not p.grad.any() and not name.endswith("key.bias")]
    assert silent == []
    assert not any(p.requires_grad or p.grad is not None for p in made.teacher.parameters())


def test_the_feedback_passes_no_gradient_to_the_student(objective, batch):
    made = open_prompts(objective()).train()
    student, (images, _) = made.student(batch()[0]), batch()
    plain = made.terms["fofa"].targets(made.teacher(images))
    aligned = made.terms["fofa"].align(student, plain)
    bent = made.teacher(images, made.terms["fofa"].bends(aligned, plain))
    sum(grid.sum() for grid in bent.maps).backward()
    assert all(p.grad is None for p in made.student.parameters())
    assert any(p.grad is not None for p in made.terms["fofa"].prompts.parameters())


@pytest.mark.parametrize("teacher", ["cnn", "vit", "mobilevit"])
def test_the_teacher_stays_frozen_and_in_eval(teacher, objective, batch):
    made = open_prompts(objective("mobilevit" if teacher == "mobilevit" else "cnn", teacher))
    (images, labels), answers = batch(teacher), []
    expected = made.teacher(images).logits
    made.teacher.model.probe = nn.Dropout(0.5)
    made.teacher.model.register_forward_hook(lambda model, inputs, logits: answers.append(model.probe(logits)))
    before = copy.deepcopy(made.teacher.state_dict())
    made.train()
    optimizer = torch.optim.AdamW(made.parameter_groups(1e-2, 0.05))
    for seed in range(2):
        step(made, batch(teacher, seed=seed), optimizer)
    for mistaken in (made.teacher, list(made.teacher.model.children())[-1]):  # somebody else's, of the whole or of a part
        mistaken.train()
        answers.clear()
        step(made, (images, labels), optimizer)
        assert torch.equal(answers[0], expected), "nothing is dropped, and BatchNorm goes by what it knows"
        assert not any(module.training for module in made.teacher.modules())
    assert all(torch.equal(value, before[key]) for key, value in made.teacher.state_dict().items())


class Asking(Term):
    """Asks the teacher about what the plain pass did not see, before FOFA's prompts ask about what it did."""

    def forward(self, lesson):
        self.turned = lesson.teach(lesson.images.flip(3), {}).logits
        self.bent = lesson.teach(lesson.images, {0: double}).logits
        self.cropped = lesson.teach(lesson.images[:, :, :16, :16], {3: double}).logits
        return {"rsd": lesson.student.logits.sum() * 0}


def double(grid):
    return 2 * grid


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_the_teacher_answers_what_it_is_asked(objective, batch, share):
    """Not what it was asked before: FOFA's own prompted pass begins with what the plain one computed."""
    made = objective("vit", "cnn", method="rsd+fofa", fofa={"prompted_stages": (-1,), "prompt_share": share}).train()
    made.terms["rsd"] = asking = Asking()
    images, labels = batch()
    with torch.no_grad():
        asked = (images.flip(3), {}), (images, {0: double}), (images[:, :, :16, :16], {3: double})
        answers = [made.teacher(*each).logits for each in asked]
    for _ in range(2):
        made(images, labels)
        for found, expected in zip((asking.turned, asking.bent, asking.cropped), answers, strict=True):
            assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("share", [1.0, 0.5])
def test_a_step_computes_what_precedes_the_prompt_once(objective, batch, share, layout):
    made = objective("vit", "cnn", fofa={"prompted_stages": (-1,), "prompt_share": share}).train()
    images, labels = batch()
    images = images.contiguous(memory_format=layout)
    made(images, labels)  # looks for what may be replayed
    runs = []
    made.teacher.model.layer2[0].conv1.register_forward_hook(lambda *_: runs.append(1))
    for count in (4, 3):
        made(images[:count], labels[:count])
    assert len(runs) == 2


class Mine(Term):
    """Penultimate vectors of one length."""

    def __init__(self, student, teacher, plan, name="mine"):
        super().__init__()
        self.name = name

    def forward(self, lesson):
        student, teacher = (seen.embedding.norm(dim=1).mean() for seen in (lesson.student, lesson.teacher))
        return {self.name: (student - teacher).square()}


class Weights(WeightsPlan):
    mine: float = 1.0


def with_a_term(monkeypatch, term):
    """The steps of docs/method.md, "A method of your own"."""
    monkeypatch.setattr(objectives, "TERMS", {**objectives.TERMS, "mine": term})
    for module in (training, objectives):
        monkeypatch.setattr(module, "FEATURE_TERMS", (*training.FEATURE_TERMS, "mine"))


def test_a_term_of_ones_own_is_balanced_and_stops_with_the_features(monkeypatch, objective, batch):
    with_a_term(monkeypatch, Mine)
    made = objective(method="mine+dist", balance="gradient", weights=Weights()).train()
    assert made(*batch()).terms.keys() == {"ce", "dist", "mine"}
    assert (made.balance.norms > 0).all()
    made.progress = 0.5
    assert made(*batch()).terms.keys() == {"ce", "dist"}


@pytest.mark.parametrize(("name", "said"), [("mine_loss", r"mine.*'mine_loss' that has no weight"), ("rsd", "mine gives rsd")])
def test_a_term_whose_losses_cannot_be_weighed_is_refused(monkeypatch, objective, batch, name, said):
    with_a_term(monkeypatch, partial(Mine, name=name))
    with pytest.raises(ModelError, match=said):
        objective(method="mine+dist", weights=Weights())(*batch())


@pytest.mark.parametrize("teacher", ["mixer", "cnn"])
def test_the_last_batch_may_be_smaller(objective, batch, teacher):
    made = objective("vit", teacher, method="fofa+rsd").train()  # the last map of this cnn is a single cell
    for count in (4, 3, 1):
        assert step(made, batch("vit", count=count)).total.isfinite()


def test_reversing_a_batch_changes_nothing_else(objective, batch):
    made, (images, labels) = open_prompts(objective()).train(), batch()
    twin = copy.deepcopy(made)
    forward, backward = made(images, labels), twin(images.flip(0), labels.flip(0))
    assert torch.allclose(forward.logits.flip(0), backward.logits, atol=1e-5)
    for name, term in forward.terms.items():
        assert torch.allclose(term, backward.terms[name], rtol=1e-4, atol=1e-6)


def test_feedback_is_of_the_same_images(objective, batch):
    """No state passes from one batch to the next but running statistics, which take no part in a loss of training."""
    made = open_prompts(objective(fofa={"standardize": False})).train()
    alone = made(*batch(seed=1)).terms
    made(*batch(seed=2, count=3))
    again = made(*batch(seed=1)).terms
    assert all(torch.equal(term, alone[name]) for name, term in again.items())


def test_feedback_is_what_the_student_lacks_of_the_plain_teacher(objective, batch):
    """The gap that each prompt is given: aligned student less standardized plain teacher, and it counts."""
    made, given = open_prompts(objective()).train(), {}
    branch = made.terms["fofa"]
    for pair, prompt in branch.prompts.items():
        hook = lambda _, inputs, named, pair=pair: given.__setitem__(int(pair), named["gap"])  # noqa: E731
        prompt.register_forward_pre_hook(hook, with_kwargs=True)
    images, labels = batch()
    told = made(images, labels).terms
    with torch.no_grad():
        targets = branch.standardize(branch.targets(made.teacher(images)))
        aligned = branch.align(made.student(images), targets)
    assert sorted(given) == list(range(len(targets)))
    for pair, gap in given.items():
        assert torch.allclose(gap, resize(aligned[pair], targets[pair].shape[-2:]) - targets[pair], atol=1e-4)
    for prompt in branch.prompts.values():
        prompt.fuse.project.weight.data.zero_()
        prompt.fuse.project.bias.data.zero_()
    assert not torch.equal(made(images, labels).terms["regularizer"], told["regularizer"])


@pytest.mark.parametrize("strength", [1e-6, 1.0, 1e6])
def test_balanced_terms_are_scaled_within_limits_and_then_weighted(strength, objective, batch, monkeypatch):
    """total = the sum of weight x scale x term, whatever a term's own size; prompts' terms are not balanced."""
    weights = {"rsd": 2.0, "regularizer": 0.5}
    made = open_prompts(objective(method="fofa+rsd", balance="gradient", weights=weights)).train()
    loss = distances.redundancy_loss
    monkeypatch.setattr(distances, "redundancy_loss", lambda *arguments: strength * loss(*arguments))
    losses = made(*batch())
    norms = dict(zip(("ce", *made.plan.terms), made.balance.norms.tolist(), strict=True))
    scales = {name: min(100.0, max(0.01, norms["ce"] / norms[name])) for name in made.plan.terms}
    expected = sum(weights.get(name, 1.0) * scales.get(name, 1.0) * float(term) for name, term in losses.terms.items())
    assert float(losses.total.detach()) == pytest.approx(expected, rel=1e-4)
    assert (scales["rsd"] in (0.01, 100.0)) == (strength != 1.0)


def test_non_square_inputs():
    class Plain(nn.Sequential):
        def __init__(self, *channels):
            layers = [nn.Conv2d(a, b, 3, 2, 1) for a, b in zip((3, *channels), channels, strict=False)]
            super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels[-1], 5))

    shape, names = (3, 24, 40), ("0", "1", "2")
    student, teacher = (tap(Plain(*widths), shape, names=names) for widths in ((4, 6, 8), (8, 8, 12)))
    fofa = {"width": 8, "heads": 2, "regions": 4, "prompted_stages": (1, 2, 3, 4), "feedback": True}
    made = Objective(student, teacher, DistillPlan(method="fofa+rsd", fofa=fofa)).train()
    assert step(made, (torch.randn(4, *shape), torch.arange(4))).total.isfinite()
    assert len(made.terms["fofa"].prompts) == 3
    assert made.notices == ("teacher stages without the prompt that was asked for: 4",)


def test_teacher_and_student_may_see_other_sizes(tapped, batch):
    plan = DistillPlan(method="fofa", fofa={"width": 8, "heads": 2, "regions": 4, "prompted_stages": (2,)})
    made = Objective(tapped("vit"), tapped("mobilevit"), plan).train()
    images, labels = batch("vit")
    seen = []
    made.teacher.model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape[2:]))
    assert step(made, (images, labels, resize(images, (64, 64)))).total.isfinite()
    assert made.diagnostics(images, labels, resize(images, (64, 64)))["samples"] == 4
    assert set(seen) == {(64, 64)} != {tuple(images.shape[2:])}


def test_state_holds_everything_but_the_teacher(objective, batch):
    made = open_prompts(objective(method="fofa+rsd")).train()
    step(made, batch())
    state = made.state_dict()
    assert {key.split(".")[0] for key in state} == {"student", "terms"}
    assert any("scales.0.mean" in key for key in state)
    assert {key for key in state if key.startswith("student.")} == {
        f"student.model.{key}" for key in made.student.model.state_dict()
    }
    other = objective(method="fofa+rsd")
    other.load_state_dict(state)
    ours, theirs = made.eval()(*batch(seed=3)), other.eval()(*batch(seed=3))
    assert torch.equal(ours.total, theirs.total)
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in made.state_dict().items())


def test_resuming_gives_the_same_steps(objective, batch):
    made = objective(method="fofa+rsd").train()
    optimizer = torch.optim.AdamW(made.parameter_groups(1e-3, 0.05))
    step(made, batch(), optimizer)
    other = objective(method="fofa+rsd").train()
    other.load_state_dict(made.state_dict())
    resumed = torch.optim.AdamW(other.parameter_groups(1e-3, 0.05))
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for seed in (1, 2):
        assert torch.equal(step(made, batch(seed=seed), optimizer).total, step(other, batch(seed=seed), resumed).total)


def test_statistics_come_from_the_plain_teacher_and_only_in_training(objective, batch):
    made, (images, labels) = open_prompts(objective(), 5.0), batch()
    made.eval()(images, labels)
    assert made.terms["fofa"].scales[0].batches == 0
    made.train()(images, labels)
    plain = made.terms["fofa"].targets(made.teacher(images))
    for scale, grid in zip(made.terms["fofa"].scales, plain, strict=True):
        assert torch.allclose(scale.mean, grid.mean((0, 2, 3)), atol=1e-5)


def test_targets_have_one_scale_whatever_the_teacher(tapped, objective, batch):
    made = objective("cnn", "cnn").train()
    images, labels = batch()
    made(images, labels)
    targets = made.terms["fofa"].standardize(made.terms["fofa"].targets(made.teacher(images)))
    assert all(0.5 < grid.square().mean() < 1.1 for grid in targets)


def test_parameter_groups(objective):
    made = objective("vit", "cnn", method="fofa+rsd")
    decayed, kept = made.parameter_groups(0.1, 0.05)
    names = {id(p): name for name, p in made.named_parameters()}
    assert len(decayed["params"]) + len(kept["params"]) == len(names)
    assert (decayed["weight_decay"], kept["weight_decay"], kept["lr"]) == (0.05, 0.0, 0.1)
    free = {names[id(p)] for p in kept["params"]}
    assert {
        "student.model.cls_token",
        "student.model.pos_embed",
        "terms.fofa.attention.positions",
        "terms.fofa.prompts.0.b",
    } <= free
    assert all(p.ndim > 1 and not names[id(p)].endswith(".bias") for p in decayed["params"])
    assert "student.model.patch_embed.proj.weight" not in free


def test_diagnostics_watch_the_prompted_teacher(objective, batch):
    made, (images, labels) = objective().train(), batch()
    before = copy.deepcopy(made.state_dict())
    same = made.diagnostics(images, labels)
    assert same["samples"] == 4
    assert same["drift_nats"] == pytest.approx(0, abs=1e-5)
    assert same["teacher_correct"] == same["prompted_correct"]
    assert made.training
    assert all(torch.equal(value, before[key]) for key, value in made.state_dict().items())
    assert open_prompts(made, 20.0).diagnostics(images, labels)["drift_nats"] > 1e-3
    assert objective(method="kd").diagnostics(images, labels)["drift_nats"] == pytest.approx(0, abs=1e-6)
    assert objective(teacher=None, method="none").diagnostics(images, labels) == {}


def test_prompts_only_where_asked_for(objective, batch):
    late = objective(fofa={"prompted_stages": (3, 4)}).train()
    assert sorted(late.terms["fofa"].prompts) == ["2", "3"]
    off = objective(fofa={"prompted_stages": ()}).train()
    runs = []
    off.teacher.model.register_forward_hook(lambda *_: runs.append(1))
    assert set(off(*batch()).terms) == {"ce", "kd", "fofa"}
    assert len(runs) == 1  # no prompted pass
    late(*batch())  # the first step also looks for what the two passes share
    late.teacher.model.register_forward_hook(lambda *_: runs.append(1))
    late(*batch())
    assert len(runs) == 3  # one plain, one prompted
    assert all(p.fuse is None for p in objective(fofa={"feedback": False}).terms["fofa"].prompts.values())


def test_features_teach_in_the_first_part_of_a_training_and_predictions_to_the_end(objective, batch):
    made = objective(method="fofa+rsd+dist", balance="gradient", features_until=0.5).train()
    made.progress = 0.49
    assert set(made(*batch()).terms) == {"ce", "dist", "fofa", "regularizer", "rsd"}
    runs = []
    made.teacher.model.register_forward_hook(lambda *_: runs.append(1))
    made.progress = 0.5
    losses = made(*batch())
    assert set(losses.terms) == {"ce", "dist"}
    assert len(runs) == 1  # no prompted pass
    losses.total.backward()
    assert all(parameter.grad is None for parameter in made.terms.parameters())
    assert any(parameter.grad is not None for parameter in made.student.parameters())
    assert made.diagnostics(*batch())["samples"] == 4  # the prompted teacher is still there to be looked at
    made.plan = made.plan.model_copy(update={"features_until": 1.0})
    assert "fofa" in made(*batch()).terms


def test_models_with_other_numbers_of_stages_are_paired(objective):
    made = objective("mobilevit", "levit")
    assert (made.terms["fofa"].student_stages, made.terms["fofa"].teacher_stages) == ([1, 2, 3], [0, 1, 2])
    assert made.notices == ("teacher stages without the prompt that was asked for: 4",)
    late = objective("mobilevit", "levit", fofa={"prompted_stages": (-1,)})  # of three pairs, with four asked for
    assert (list(late.terms["fofa"].prompts), late.terms["fofa"].first_prompt, late.notices) == (["2"], 2, ())
    assert objective("mobilevit", "levit", fofa={"prompted_stages": (-4,)}).notices == (
        "teacher stages without the prompt that was asked for: -4",
    )


def test_what_does_not_fit_is_refused_up_front(tapped):
    import timm

    other = tap(timm.create_model("resnet10t", num_classes=7), (3, 32, 32))
    with pytest.raises(ModelError, match="7 classes, the student 5"):
        Objective(tapped("cnn"), other, DistillPlan(method="kd"))
    with pytest.raises(ModelError, match="needs a teacher"):
        Objective(tapped("cnn"), None, DistillPlan(method="kd"))
    blind = tapped("cnn")
    blind.embedding_width = None
    with pytest.raises(ModelError, match="rsd needs"):
        Objective(tapped("cnn"), blind, DistillPlan(method="rsd"))


def test_the_teacher_moves_along(objective):
    made = objective().to(torch.float64)
    assert next(made.teacher.parameters()).dtype == torch.float64


def test_mixed_precision_keeps_losses_in_float32(objective, batch):
    made = open_prompts(objective(method="fofa+rsd")).train()
    with torch.autocast("cpu", torch.bfloat16):
        losses = made(*batch())
    losses.total.backward()
    assert losses.total.dtype == torch.float32
    assert all(term.dtype == torch.float32 and term.isfinite() for term in losses.terms.values())


@pytest.mark.filterwarnings("ignore:Grad strides")
def test_under_ddp_every_parameter_takes_part(objective, batch, tmp_path):
    made = objective(method="fofa+rsd").train()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(made)
        for seed in range(2):  # the second step fails if a parameter had no part in the first
            wrapped(*batch(seed=seed)).total.backward()
    finally:
        torch.distributed.destroy_process_group()
    assert all(p.grad is not None for p in made.parameters())


def test_label_smoothing(objective, batch):
    images, labels = batch()
    made = objective(teacher=None, method="none", label_smoothing=0.2).eval()
    expected = nn.functional.cross_entropy(made.student(images).logits, labels, label_smoothing=0.2)
    assert torch.allclose(made(images, labels).total, expected)


def test_it_learns_and_the_student_exports_alone(objective, batch):
    made, data = objective(method="fofa+rsd").train(), batch()
    optimizer = torch.optim.AdamW(made.parameter_groups(3e-3, 0.0))
    totals = [float(step(made, data, optimizer).total.detach()) for _ in range(8)]
    assert totals[-1] < 0.8 * totals[0]
    student = made.student.model.eval()
    assert torch.allclose(torch.export.export(student, (data[0],)).module()(data[0]), student(data[0]), atol=1e-4)


def test_a_teacher_that_forgets_is_told_of():
    from fofa_deploy.distill.job import forgotten
    from fofa_deploy.results import Epoch

    def curve(prompted):
        told = {"teacher_top1": 0.9, "prompted_top1": prompted, "drift_nats": 0.1}
        return (Epoch(epoch=1, step=1, lr=0.1, loss=1.0, diagnostics=told, seconds=1.0),)

    assert forgotten(()) == forgotten(curve(0.895)) == ()
    assert "forgot 15.0 points" in forgotten(curve(0.75))[0]


def test_rsd_asks_no_more_of_a_batch_than_it_can_tell(objective, batch):
    wide, narrow = (objective("vit", "cnn", method="rsd", batch_size=count) for count in (1000, 4))
    teacher = wide.teacher.embedding_width
    assert not list(wide.terms["rsd"].sketch.buffers())
    sketch = narrow.terms["rsd"].sketch
    assert sketch.basis.shape == (teacher, 4)
    assert torch.allclose(sketch.basis.T @ sketch.basis, torch.eye(4), atol=1e-5)
    assert "terms.rsd.sketch.basis" in narrow.state_dict()
    assert step(narrow.train(), batch("vit")).total.isfinite()


def test_rsd_compares_no_more_dimensions_than_a_pass_has_images(objective):
    def width(**plan):
        return sum(parameter.shape[0] for name, parameter in objective(method="rsd", **plan).terms["rsd"].named_parameters())

    whole, shared = width(batch_size=8), width(batch_size=8, accumulate=4)
    assert shared < whole
    assert objective(method="rsd", batch_size=2, accumulate=4).terms["rsd"] is not None  # the trainer refuses such a plan, by name


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo looks at it
def test_compiled_in_parts_both_models_learn_as_uncompiled_ones_do(objective, batch, compiling):
    """Stages of other widths, a prompt between them, a smaller last batch, evaluation: each part is compiled for itself."""
    plain = objective(method="fofa+rsd+dist", balance="gradient", fofa={"prompted_stages": (-1,)}).train()
    made = [plain, copy.deepcopy(plain)]
    for model in (made[1].student, made[1].teacher):
        compiled(model)
    # Gradients are 25 long here: longer steps than these make anything of a difference in rounding.
    optimizers = [torch.optim.SGD(one.parameters(), 1e-4) for one in made]
    for count in (4, 4, 3):
        losses = [step(one, batch(count=count), optimizer) for one, optimizer in zip(made, optimizers, strict=True)]
        assert {name: float(term) for name, term in losses[1].terms.items()} == pytest.approx(
            {name: float(term) for name, term in losses[0].terms.items()}, rel=1e-4, abs=1e-6
        )
    told = [one.diagnostics(*batch(count=5)) for one in made]
    assert told[1] == pytest.approx(told[0], abs=1e-5)


def test_a_student_that_drops_tokens_in_training_is_refused(objective, batch):
    made = objective("vit", "cnn", method="fofa+dist")
    made.student.model.patch_drop = PatchDropout(0.75)  # 16 tokens become 4, which look like a grid
    with torch.no_grad():
        made.eval()(*batch())
    with pytest.raises(ModelError, match=r"passes \(192, 2, 2\), and passed \(192, 4, 4\) when.*"):
        made.train()(*batch())


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.grids = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU()
        )
        self.classifier = nn.Linear(8, 5)

    def forward(self, images):
        return self.classifier(self.grids(images).mean(dim=(2, 3)))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo looks at it
def test_kernels_that_another_program_left_on_disk_are_not_taken(batch, compiling, monkeypatch, tmp_path):
    """Theirs may write over what was saved for the backward pass, which the balance of terms walks more than once."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    theirs, ours = (tap(Small().eval(), (3, 32, 32), names=("grids",)).train() for _ in range(2))
    images, _ = batch("cnn")
    with torch._functorch.config.patch(donated_buffer=True), torch.compiler.config.patch(cache_key_tag=""):
        for part in _parts(theirs):
            part.forward = torch.compile(part.forward, dynamic=False)
        theirs(images).logits.square().sum().backward()
    torch._dynamo.reset()
    compiled(ours)
    loss, weights = ours(images).logits.square().sum(), list(ours.parameters())
    first, second = (torch.autograd.grad(loss, weights, retain_graph=True) for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))
