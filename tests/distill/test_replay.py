"""The prompted pass without its prefix is the prompted pass."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn

from fofa_deploy.distill.replay import Prefix
from fofa_deploy.distill.tapped import TappedModel
from fofa_deploy.distill.taps import tap


def double(grid):
    return 2 * grid


def passes(teacher, images, first, replay):
    """Prompted logits and maps, and the gradient at the prompt, with or without what the plain pass kept."""
    factor = torch.tensor(1.5, requires_grad=True)
    prefix = Prefix(teacher, first, images[:1])
    with torch.no_grad(), prefix.recording(images):
        teacher(images)
    with prefix.replaying(images) if replay else nullcontext():
        bent = teacher(images, {first: lambda grid: factor * grid})
    bent.logits.square().sum().backward()
    return [bent.logits, *bent.maps, factor.grad], prefix.names


@pytest.mark.parametrize("kind", ["cnn", "vit", "distilled", "swin", "mixer", "mobilevit", "coat", "levit", "pvt"])
def test_same_values_and_gradients(kind, tapped, batch):
    teacher, (images, _) = tapped(kind).eval().requires_grad_(False), batch(kind)
    first = len(teacher.stages) - 1
    if teacher.entries[first] is None:
        first = next(i for i, entry in enumerate(teacher.entries) if entry is not None)
    computed, names = passes(teacher, images, first, replay=False)
    replayed, _ = passes(teacher, images, first, replay=True)
    assert names
    for one, other in zip(computed, replayed, strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-6)
    assert not any("forward" in vars(module) for module in teacher.modules())


@pytest.mark.parametrize("kind", ["cnn", "vit", "distilled", "swin", "mixer", "mobilevit", "coat", "levit", "pvt"])
def test_a_part_of_the_batch_gets_its_part_of_what_was_kept(kind, tapped, batch):
    teacher, (images, _) = tapped(kind).eval().requires_grad_(False), batch(kind)
    first = max(index for index, entry in enumerate(teacher.entries) if entry is not None)
    prefix = Prefix(teacher, first, images[:1], whole=False)
    with torch.no_grad():
        computed = teacher(images[:2], {first: double})
        with prefix.recording(images):
            teacher(images)
        kept = len(prefix._kept)
        with prefix.replaying(images[:2]):
            replayed = teacher(images[:2], {first: double})
    assert kept == len(prefix.names) > 0
    for one, other in zip([computed.logits, *computed.maps], [replayed.logits, *replayed.maps], strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-4)  # sums in another order for another batch


def test_the_prefix_is_not_computed_twice(tapped, batch):
    teacher, (images, _) = tapped("cnn").eval().requires_grad_(False), batch("cnn")
    prefix = Prefix(teacher, 3, images[:1])
    runs = []
    teacher.model.get_submodule("layer2").get_submodule("0.conv1").register_forward_hook(lambda *_: runs.append(1))
    with torch.no_grad(), prefix.recording(images):
        teacher(images)
    with prefix.replaying(images):
        teacher(images, {3: double})
    assert len(runs) == 1
    teacher(images, {3: double})  # and forgotten afterwards
    assert len(runs) == 2


def test_a_compiled_part_stays_compiled(tapped, batch):
    teacher, (images, _) = tapped("cnn").eval().requires_grad_(False), batch("cnn")
    prefix = Prefix(teacher, 3, images[:1])
    part = teacher.model.get_submodule(prefix.names[0])
    compiled = part.forward = lambda *args: type(part).forward(part, *args)
    with torch.no_grad(), prefix.recording(images):
        teacher(images)
    with prefix.replaying(images):
        teacher(images, {3: double})
    assert part.forward is compiled


class Awkward(nn.Module):
    """What must not be replayed: a module used twice, and an output that is written over."""

    def __init__(self):
        super().__init__()
        self.first, self.overwritten, self.last = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.twice = nn.Tanh()
        self.classifier = nn.Linear(4, 5)

    def forward(self, images):
        grid = self.overwritten(self.twice(self.first(images)))
        grid.add_(1.0)
        return self.classifier(self.last(self.twice(grid)).mean(dim=(2, 3)))


def test_awkward_modules_are_computed(batch):
    torch.manual_seed(0)
    teacher = tap(Awkward().eval(), (3, 8, 8), names=("first", "last")).requires_grad_(False)
    assert isinstance(teacher, TappedModel)
    images = torch.randn(2, 3, 8, 8)
    computed, names = passes(teacher, images, 1, replay=False)
    replayed, _ = passes(teacher, images, 1, replay=True)
    assert names == ("first",)
    assert all(torch.equal(one, other) for one, other in zip(computed, replayed, strict=True))


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Conv2d(3, 4, 1)

    def forward(self, images):
        grid = self.inner(images)
        return grid, grid + 1


class Paired(nn.Module):
    """A part that passes a tuple, which cannot be replayed, although what is in it could."""

    def __init__(self):
        super().__init__()
        self.pair, self.first, self.last = Pair(), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.classifier = nn.Linear(4, 5)

    def forward(self, images):
        one, other = self.pair(images)
        return self.classifier(self.last(self.first(one + other)).mean(dim=(2, 3)))


def test_nothing_inside_a_compiled_part_is_replayed():
    """Its hooks, and the constant in its place, would make the part be compiled again, or be left out of what was compiled."""
    teacher = tap(Paired().eval(), (3, 8, 8), names=("first", "last")).requires_grad_(False)
    images = torch.randn(1, 3, 8, 8)
    assert Prefix(teacher, 1, images).names == ("pair.inner", "first")
    part = teacher.model.pair
    part.forward = lambda *args: type(part).forward(part, *args)
    assert Prefix(teacher, 1, images).names == ("first",)
