"""Models that declare nothing, with taps named by the user: torchvision's, and the user's own."""

import pytest
import torch
import torchvision
from torch import nn

from fofa_deploy.config import DistillPlan
from fofa_deploy.distill.objective import Objective
from fofa_deploy.distill.taps import tap
from fofa_deploy.errors import ModelError

CLASSES, SHAPE = 5, (3, 32, 32)
MODELS = {
    "cnn": (
        lambda: torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=CLASSES),
        ("layer1", "layer2", "layer3"),
    ),
    "tokens": (
        lambda: torchvision.models.VisionTransformer(32, 8, 3, 2, 16, 32, num_classes=CLASSES),
        tuple(f"encoder.layers.encoder_layer_{index}" for index in range(3)),
    ),
    # 16 x 16 x 16 at the first tap: the second one tells that channels come last.
    "nhwc": (
        lambda: torchvision.models.SwinTransformer([2, 2], 16, [1, 1], [2, 2], [4, 4], num_classes=CLASSES),
        ("features.1", "features.3"),
    ),
}
TO_GRID = {
    "cnn": lambda raw: raw,
    "tokens": lambda raw: raw[:, 1:].transpose(1, 2).unflatten(2, (4, 4)),
    "nhwc": lambda raw: raw.permute(0, 3, 1, 2),
}


def built(kind):
    torch.manual_seed(0)
    make, names = MODELS[kind]
    model = make()
    with torch.no_grad():  # torchvision starts a head at zero
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return tap(model, SHAPE, names=names)


@pytest.mark.parametrize("kind", MODELS)
def test_maps_are_what_the_named_modules_pass(kind):
    model, images = built(kind).eval(), torch.randn(3, *SHAPE)
    raw = {}
    for name in MODELS[kind][1]:
        model.model.get_submodule(name).register_forward_hook(lambda _, args, out, name=name: raw.setdefault(name, out))
    with torch.no_grad():
        features = model(images)
    assert [stage.module for stage in model.stages] == list(raw)
    for grid, stage, out in zip(features.maps, model.stages, raw.values(), strict=True):
        assert torch.equal(grid, TO_GRID[kind](out))
        assert tuple(grid.shape[1:]) == stage.shape
        assert stage.height == stage.width


@pytest.mark.parametrize("kind", MODELS)
def test_a_prompt_of_nothing_changes_nothing_and_another_does(kind):
    model, images = built(kind).eval(), torch.randn(2, *SHAPE)
    with torch.no_grad():
        plain, same = model(images), model(images, {index: lambda grid: grid.clone() for index in range(len(model.stages))})
        assert all(torch.equal(*pair) for pair in zip([plain.logits, *plain.maps], [same.logits, *same.maps], strict=True))
        for index, stage in enumerate(model.stages):
            bent = model(images, {index: lambda grid: grid.flip(1)})
            assert not torch.equal(bent.maps[index], plain.maps[index]), stage
            assert not torch.equal(bent.logits, plain.logits)


@pytest.mark.parametrize(("student", "teacher"), [("cnn", "nhwc"), ("nhwc", "tokens"), ("tokens", "cnn")])
def test_every_kind_teaches_and_learns(student, teacher):
    plan = DistillPlan(
        method="fofa+rsd", fofa={"width": 8, "heads": 2, "regions": 4, "prompted_stages": (1, 2, 3, 4), "feedback": True}
    )
    made = Objective(built(student), built(teacher), plan).train()
    optimizer = torch.optim.AdamW(made.parameter_groups(1e-3, 0.05))
    before = {name: p.detach().clone() for name, p in made.student.named_parameters()}
    for count in (3, 2):
        losses = made(torch.randn(count, *SHAPE), torch.arange(count))
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
        assert losses.total.isfinite()
    assert len(made.terms["fofa"].prompts) == min(len(made.student.stages), len(made.teacher.stages))
    assert not [name for name, p in made.student.named_parameters() if torch.equal(p, before[name])]


class Odd(nn.Module):
    """Modules that cannot be tapped, each for its own reason."""

    def __init__(self):
        super().__init__()
        self.conv, self.twice, self.unused = nn.Conv2d(3, 8, 8, stride=8), nn.Conv2d(8, 8, 1), nn.Identity()
        self.sequence_first, self.pair, self.head = nn.Linear(8, 8), nn.LSTM(8, 8), nn.Linear(8, CLASSES)

    def forward(self, images):
        grid = self.twice(self.twice(self.conv(images)))
        tokens = self.sequence_first(grid.flatten(2).permute(2, 0, 1))
        return self.head(self.pair(tokens)[0].mean(0))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("twice", "twice runs more than once"),
        ("sequence_first", r"passes \(16, 2, 8\), without the batch in front"),
        ("pair", "passes a tuple"),
        ("head", r"shape \(2, 5\) is neither"),
        ("unused", "not passed on by any module that runs once"),
        ("convolution", "has no module convolution"),
    ],
)
def test_a_tap_that_cannot_be_says_why(name, message):
    with pytest.raises(ModelError, match=message):
        tap(Odd(), SHAPE, names=("conv", name))


class Auxiliary(nn.Sequential):
    """Passes one tensor in eval mode, two in training, as Inception and GoogLeNet do."""

    def forward(self, images):
        logits = super().forward(images)
        return (logits, logits) if self.training else logits


def test_a_student_with_auxiliary_classifiers_is_refused_in_words():
    model = tap(Auxiliary(nn.Conv2d(3, 4, 8, stride=8), nn.Flatten(), nn.Linear(64, CLASSES)), SHAPE, names=("0",))
    images = torch.randn(2, *SHAPE)
    assert model.eval()(images).logits.shape == (2, CLASSES)
    with pytest.raises(ModelError, match="Auxiliary passes a tuple in place of logits"):
        model.train()(images)
