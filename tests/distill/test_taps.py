"""Any model through declared features: layouts proven, the model untouched."""

import copy
import pickle

import pytest
import timm
import torch
from torch import nn

from fofa_deploy.distill import layouts
from fofa_deploy.distill.layouts import Layout
from fofa_deploy.distill.taps import evenly, tap
from fofa_deploy.errors import ModelError

CLASSES = 5
KINDS = ["cnn", "coat", "distilled", "hiera", "levit", "mixer", "mobilevit", "pit", "pvt", "swin", "vit"]


def distance(left, right):
    return float((left - right).norm() / right.norm())


@pytest.mark.parametrize("kind", KINDS)
def test_maps_equal_the_declared_intermediates(kind, tapped, batch):
    model, (images, _) = tapped(kind).eval(), batch(kind, count=3)
    with torch.no_grad():
        declared = model.model.forward_intermediates(images, output_fmt="NCHW", norm=False, intermediates_only=True)
        features = model(images)
    for grid, stage in zip(features.maps, model.stages, strict=True):
        assert tuple(grid.shape) == (3, *stage.shape)
        assert any(grid.shape == other.shape and distance(grid, other) < 1e-5 for other in declared)


@pytest.mark.parametrize("kind", KINDS)
def test_an_identity_prompt_changes_nothing(kind, tapped, batch):
    model, (images, _) = tapped(kind).eval(), batch(kind)
    seen = {}
    prompts = {
        index: lambda grid, index=index: seen.setdefault(index, grid.clone()) for index, entry in enumerate(model.entries) if entry
    }
    with torch.no_grad():
        plain, bent = model(images), model(images, prompts)
    assert len(prompts) == len(model.stages)
    assert all(tuple(seen[index].shape[1:]) == model.entries[index].shape for index in prompts)
    assert all(torch.equal(*pair) for pair in zip([plain.logits, *plain.maps], [bent.logits, *bent.maps], strict=True))


@pytest.mark.parametrize("kind", ["cnn", "distilled", "levit", "mixer", "pit", "pvt", "swin"])
def test_images_need_not_be_square(kind, wide):
    model, images = wide(kind)
    with torch.no_grad():
        declared = model.model.forward_intermediates(images, output_fmt="NCHW", norm=False, intermediates_only=True)
        plain, bent = model(images), model(images, {i: lambda grid: grid.clone() for i, entry in enumerate(model.entries) if entry})
    for grid, stage in zip(plain.maps, model.stages, strict=True):
        assert stage.width > stage.height
        assert any(grid.shape == other.shape and distance(grid, other) < 1e-5 for other in declared)
    assert all(model.entries)
    assert all(torch.equal(*pair) for pair in zip([plain.logits, *plain.maps], [bent.logits, *bent.maps], strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_each_prompt_changes_its_own_stage_and_none_before(kind, tapped, batch):
    model, (images, _) = tapped(kind).eval(), batch(kind, count=2)
    with torch.no_grad():
        plain = model(images)
        for index in range(len(model.stages)):
            bent = model(images, {index: lambda grid: grid + torch.randn_like(grid)})
            assert distance(bent.maps[index], plain.maps[index]) > 1e-6
            assert distance(bent.logits, plain.logits) > 1e-7
            same_module = model.entries[index].module
            assert all(
                torch.equal(bent.maps[i], plain.maps[i])
                for i in range(index)
                if model.stages[i].module == same_module or kind == "cnn"
            )


def test_a_stage_behind_lists_of_tensors_is_entered_from_the_stage_before_it():
    model = tap(timm.create_model("selecsls42", num_classes=CLASSES).eval(), (3, 64, 64))
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain, bent = model(images), model(images, {2: lambda grid: 2 * grid})
    assert [entry.module for entry in model.entries] == ["features.1", "features.3", "features.5", "head.1"]
    assert all(torch.equal(*pair) for pair in zip(plain.maps[:2], bent.maps[:2], strict=True))
    assert distance(bent.maps[2], plain.maps[2]) > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_is_as_before(kind, tapped, batch):
    model, (images, _) = tapped(kind), batch(kind)
    before = copy.deepcopy(model.model.state_dict())
    model.eval()(images)
    model(images, {1: lambda grid: 2 * grid})
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert list(model.model.state_dict()) == list(before)
    assert all(torch.equal(value, before[key]) for key, value in model.model.state_dict().items())


def test_logits_are_the_ordinary_ones_and_hooks_go_even_after_an_error(tapped, batch):
    model, (images, _) = tapped("vit").eval(), batch("vit")
    assert torch.equal(model(images).logits, model.model(images))
    with pytest.raises(ZeroDivisionError):
        model(images, {2: lambda grid: grid / (1 // 0)})
    assert not any(module._forward_hooks for module in model.modules())


def test_tapping_keeps_modes_and_batchnorm_statistics():
    model = timm.create_model("resnet10t", num_classes=CLASSES)
    model.train()
    model.layer1.eval()
    modes = [module.training for module in model.modules()]
    statistics = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    tap(model, (3, 32, 32))
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, statistics[key]) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


def test_prefix_tokens_are_cut_in_front_and_put_back():
    raw = torch.arange(2 * 7 * 3.0).reshape(2, 7, 3)
    layout = Layout("tokens", prefix=1)
    grid = layouts.to_grid(raw, layout, 2, 3)
    assert torch.equal(grid[:, :, 0, 0], raw[:, 1])
    assert torch.equal(grid[:, :, 1, 2], raw[:, 6])
    assert torch.equal(layouts.from_grid(grid, raw, layout), raw)
    bent = layouts.from_grid(torch.zeros_like(grid), raw, layout)
    assert torch.equal(bent[:, 0], raw[:, 0])
    assert not bent[:, 1:].any()


@pytest.mark.parametrize(
    ("layout", "shape"),
    [
        (Layout("nchw"), (2, 5, 3, 4)),
        (Layout("nhwc"), (2, 3, 4, 5)),
        (Layout("tokens"), (2, 12, 5)),
        (Layout("tokens", prefix=3), (2, 15, 5)),
        (Layout("tokens"), (2, 4, 3, 5)),
        (Layout("channel_tokens"), (2, 5, 12)),
        (Layout("tokens", order=(3, 1, 0, 2, 4, 6, 5, 7, 8, 11, 10, 9)), (2, 12, 5)),
    ],
)
def test_layouts_round_trip_and_are_proven_from_values(layout, shape):
    raw = torch.randn(shape)
    grid = layouts.to_grid(raw, layout, 3, 4)
    assert tuple(grid.shape) == (2, 5, 3, 4)
    assert torch.equal(layouts.from_grid(grid, raw, layout), raw)
    error, proven = layouts.prove(raw, grid)
    assert error == 0
    assert torch.equal(layouts.to_grid(raw, proven, 3, 4), grid)
    assert layouts.prove(raw, torch.randn_like(grid)) is None


def test_values_decide_where_shapes_do_not():
    raw = torch.randn(2, 4, 4, 4)
    assert layouts.prove(raw, raw)[1].kind == "nchw"
    assert layouts.prove(raw, raw.permute(0, 3, 1, 2))[1].kind == "nhwc"
    assert layouts.prove((torch.zeros(2), [raw]), raw)[1].path == (1, 0)


def test_stages_by_depth_end_at_the_last():
    assert evenly(12, 4) == [2, 5, 8, 11]
    assert evenly(5, 4) == [1, 2, 3, 4]
    assert evenly(3, 4) == [0, 1, 2]
    assert evenly(32, 1) == [31]


@pytest.mark.parametrize(
    ("kind", "modules"), [("cnn", ["layer1", "layer2", "layer3", "layer4"]), ("vit", [f"blocks.{i}" for i in range(4)])]
)
def test_stages_are_the_deepest_resolutions_or_even_depths(kind, modules, tapped):
    assert [stage.module for stage in tapped(kind).stages] == modules


def test_fewer_taps_than_stages_make_fewer_stages(tapped):
    assert len(tapped("levit").stages) == 3


def test_the_embedding_enters_the_classifier(tapped, batch):
    model, (images, _) = tapped("cnn").eval(), batch("cnn")
    features = model(images)
    assert features.embedding.shape == (4, model.embedding_width)
    assert torch.allclose(model.model.fc(features.embedding), features.logits)
    assert tapped("distilled").embedding_width == 2 * tapped("vit").embedding_width  # both heads' inputs


def test_copies_and_pickles(tapped, batch):
    model, (images, _) = tapped("swin").eval(), batch("swin")
    twin = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert torch.equal(twin(images).logits, model(images).logits)


def test_exports_after_use(tapped, batch):
    model, (images, _) = tapped("vit").eval(), batch("vit", count=2)
    expected = model(images, {0: lambda grid: grid}).logits
    program = torch.export.export(model.model, (images,))
    assert torch.allclose(program.module()(images), expected, atol=1e-5)


@pytest.mark.parametrize(("kind", "size"), [("cnn", (48, 32)), ("mobilevit", (64, 96)), ("pvt", (64, 32))])
def test_other_image_sizes_than_the_probe(kind, size, tapped):
    model = tapped(kind).eval()
    features = model(torch.randn(3, 3, *size))
    assert features.maps[0].shape[-2] * size[1] == features.maps[0].shape[-1] * size[0]


class Tokens(nn.Module):
    """A plain module: patches of 8x8, a class token in front."""

    def __init__(self, count=1):
        super().__init__()
        self.embed = nn.Conv2d(3, 8, 8, stride=8)
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.head = nn.Linear(8, CLASSES)
        self.count = count

    def forward(self, images):
        tokens = self.embed(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([tokens[:, : self.count] * 0, tokens], dim=1)
        for block in self.blocks:
            tokens = block(tokens)
        return self.head(tokens[:, 0])


@pytest.mark.parametrize("shape", [(3, 32, 32), (3, 32, 64)])
def test_plain_modules_with_named_taps(shape):
    model = tap(Tokens(), shape, names=("embed", "blocks.0", "blocks.2"))
    assert [(stage.layout.kind, stage.layout.prefix) for stage in model.stages] == [("nchw", 0), ("tokens", 1), ("tokens", 1)]
    assert all((stage.height, stage.width) == (4, shape[2] // 8) for stage in model.stages)
    assert model.embedding_width == 8
    features = model(torch.randn(2, *shape))
    assert [tuple(grid.shape) for grid in features.maps] == [(2, 8, 4, shape[2] // 8)] * 3


class Overwriting(nn.Module):
    """Writes over a tapped tensor."""

    def __init__(self):
        super().__init__()
        self.conv, self.act, self.head = nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Linear(4, CLASSES)

    def forward(self, images):
        return self.head(self.act(self.conv(images)).mean((2, 3)))


def test_maps_are_what_left_the_stage_even_if_written_over():
    model = tap(Overwriting(), (3, 8, 8), names=("conv",))
    images = torch.randn(2, 3, 8, 8)
    assert torch.equal(model(images).maps[0], model.model.conv(images))


@pytest.mark.parametrize(
    ("model", "names", "message"),
    [
        (Tokens(), (), "declares no features"),
        (Tokens(), ("blocks.7",), "no module blocks.7"),
        (Tokens(), ("head",), "neither"),
        (nn.Sequential(nn.Flatten(2)), ("0",), "logits"),
    ],
)
def test_errors_say_what_to_do(model, names, message):
    with pytest.raises(ModelError, match=message):
        tap(model, (3, 32, 32), names=names)


def test_broken_weights_are_refused():
    model = timm.create_model("resnet10t", num_classes=CLASSES)
    nn.init.constant_(model.fc.weight, float("nan"))
    with pytest.raises(ModelError, match="not finite"):
        tap(model, (3, 32, 32))


def test_timm_names_overrule_the_choice():
    model = tap(timm.create_model("resnet10t", num_classes=CLASSES), (3, 32, 32), names=("layer2", "layer4.0.conv1"))
    assert [stage.module for stage in model.stages] == ["layer2", "layer4.0.conv1"]


class Unordered(nn.Module):
    """Defined in another order than run, and its logits are scaled at the end: as people write them."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, CLASSES)
        self.body = nn.Conv2d(3, 6, 3)
        self.gate = nn.Conv2d(6, 6, 1)

    def forward(self, images):
        grid = self.body(images)
        grid = grid * self.gate(grid.mean((2, 3), keepdim=True)).sigmoid()
        return 3 * self.head(grid.mean((2, 3)))


def test_a_plain_modules_classifier_is_what_gives_its_logits_and_not_what_was_defined_last():
    model = tap(Unordered(), (3, 8, 8), names=("body",))
    assert (model.heads, model.embedding_width) == (("head",), 6)


def test_without_such_a_layer_there_is_no_embedding():
    model = tap(
        nn.Sequential(nn.Conv2d(3, CLASSES + 1, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), Narrowing()), (3, 8, 8), stages=0
    )
    assert (model.heads, model.embedding_width, model.classes) == ((), None, CLASSES)


class Narrowing(nn.Module):
    def forward(self, numbers):
        return numbers[:, 1:]


def test_where_no_map_is_compared_nothing_has_to_be_declared():
    model = tap(Tokens(), (3, 32, 32), stages=0)
    assert (model.stages, model.entries, model.heads) == ((), (), ("head",))
    found = model(torch.randn(2, 3, 32, 32))
    assert (found.logits.shape, found.maps) == ((2, CLASSES), ())
