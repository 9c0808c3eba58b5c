"""Pruned networks: shapes by the plan alone, strict loading, distilling, capturing, and a refusal where it cannot be."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from tiny import python
from torch import Tensor, nn

from fofa_deploy.capture import capture
from fofa_deploy.config import DataPlan, DistillPlan, ModelPlan, TeacherPlan
from fofa_deploy.data import Split
from fofa_deploy.data.sources import ArraySource
from fofa_deploy.distill.inputs import pruned_inputs
from fofa_deploy.distill.objective import Objective
from fofa_deploy.distill.taps import tap
from fofa_deploy.errors import ModelError
from fofa_deploy.models import build_model, code_identity, load_weights, parameter_count, save_weights
from fofa_deploy.profile import find_profile
from fofa_deploy.store import canonical, digest
from fofa_deploy.types import Preprocessing
from fofa_deploy.verify import CHECKED_BATCHES, GraphCheck, check_graph

torch.set_num_threads(1)
SIDE, CLASSES, NAMES = 32, 7, tuple("abcdefg")
CNN = {"model": "timm:resnet18", "arguments": {"channels": [32, 32, 64, 64], "layers": [1, 1, 1, 1]}}
VIT = {"model": "timm:vit_tiny_patch16_224", "arguments": {"patch_size": 8, "embed_dim": 96, "depth": 3}}
MODELS = {
    "cnn": CNN,
    "vit": VIT,
    "mobilenet": {"model": "timm:mobilenetv3_small_100"},
    "efficientnet": {"model": "timm:efficientnet_lite0"},
    "convnext": {"model": "timm:convnext_atto"},
    "regnet": {"model": "timm:regnetx_002"},
    "densenet": {"model": "timm:densenet121", "arguments": {"block_config": [2, 2, 2, 2]}},
}


class Doubling(nn.Module):
    """Its forward() holds a width that no pruning finds."""

    def __init__(self, num_classes: int = CLASSES, in_chans: int = 3) -> None:
        super().__init__()
        self.body, self.head = nn.Conv2d(in_chans, 32, 3), nn.Linear(32, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(images).mean((2, 3)) + torch.arange(32.0))


class Narrow(Doubling):
    """No layer can lose eight channels."""

    def __init__(self, num_classes: int = CLASSES, in_chans: int = 3) -> None:
        super().__init__()
        self.body, self.head = nn.Conv2d(in_chans, 8, 3), nn.Linear(8, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(images).mean((2, 3)))


def made(kind: str, share: float, seed: int = 0, **options) -> nn.Module:
    torch.manual_seed(seed)
    return build_model(ModelPlan(**{**MODELS[kind], **options}, prune=share), CLASSES, 3, (SIDE, SIDE))


def shapes(model: nn.Module) -> dict[str, list[int]]:
    return {key: list(value.shape) for key, value in model.state_dict().items()}


def images(count: int = 2) -> Tensor:
    return torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", MODELS)
def test_parameters_fall_and_input_and_classes_stay(kind):
    models = [made(kind, share).eval() for share in (0.0, 0.25, 0.5)]
    counts = [parameter_count(model) for model in models]
    assert counts[0] > counts[1] > counts[2]
    assert counts[2] < 0.6 * counts[0]
    for model in models:
        with torch.no_grad():
            assert model(images(3)).shape == (3, CLASSES)


@pytest.mark.parametrize("kind", MODELS)
def test_shapes_do_not_hang_on_weights(kind):
    one, other = made(kind, 0.5, seed=0), made(kind, 0.5, seed=1)
    assert shapes(one) == shapes(other)
    assert all(module.training for module in one.modules())


@pytest.mark.parametrize("kind", ["cnn", "vit"])
def test_the_same_plan_is_the_same_network_in_another_process(kind, tmp_path):
    code = (
        "import json, sys, torch; torch.manual_seed(5); torch.set_num_threads(1)\n"
        "from fofa_deploy.config import ModelPlan; from fofa_deploy.models import build_model, load_weights\n"
        f"model = build_model(ModelPlan(**json.loads(sys.argv[1])), {CLASSES}, 3, ({SIDE}, {SIDE})).eval()\n"
        "load_weights(model, __import__('pathlib').Path(sys.argv[2]))\n"
        f"x = torch.randn(2, 3, {SIDE}, {SIDE}, generator=torch.Generator().manual_seed(0))\n"
        "print(json.dumps(model(x).tolist()))\n"
    )
    model = made(kind, 0.5).eval()
    save_weights(model, tmp_path / "w.safetensors")
    process = python(code, json.dumps({**MODELS[kind], "prune": 0.5}), tmp_path / "w.safetensors")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    with torch.no_grad():
        torch.testing.assert_close(torch.tensor(json.loads(out)), model(images()))


def test_equal_weights_are_pruned_alike():
    one, other = made("cnn", 0.5).state_dict(), made("cnn", 0.5).state_dict()
    assert all(torch.equal(value, other[key]) for key, value in one.items())


def test_the_weakest_channels_go_and_the_checkpoint_is_the_whole_network(tmp_path):
    whole = made("cnn", 0.0)
    with torch.no_grad():  # of the first block's inner channels, which nothing else shares, every second one is silent
        for parameter in (whole.layer1[0].conv1.weight, whole.layer1[0].bn1.weight, whole.layer1[0].bn1.bias):
            parameter[::2] = 0.0
        whole.layer1[0].conv2.weight[:, ::2] = 0.0
    save_weights(whole, tmp_path / "w.safetensors")
    small = made("cnn", 0.5, seed=3, checkpoint=tmp_path / "w.safetensors")
    assert small.layer1[0].conv1.out_channels == 16
    assert bool((small.layer1[0].bn1.weight != 0).all())


def test_another_share_is_refused_by_strict_loading(tmp_path):
    save_weights(made("cnn", 0.5), tmp_path / "w.safetensors")
    with pytest.raises(ModelError, match="of another shape"):
        load_weights(made("cnn", 0.25), tmp_path / "w.safetensors")


@pytest.mark.parametrize("kind", ["cnn", "vit"])
def test_two_steps_of_distillation(kind):
    torch.manual_seed(0)
    student = tap(made(kind, 0.5), (3, SIDE, SIDE))
    teacher = tap(made("cnn" if kind == "vit" else "vit", 0.0), (3, SIDE, SIDE))
    method = DistillPlan(method="fofa+rsd", fofa={"width": 16, "heads": 2, "regions": 4})
    objective = Objective(student, teacher, method).train()
    optimizer = torch.optim.AdamW(objective.parameter_groups(1e-3, 0.05))
    for _ in range(2):
        losses = objective(images(4), torch.arange(4))
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
    assert bool(losses.total.detach().isfinite())
    assert all(stage.channels == features.shape[1] for stage, features in zip(student.stages, student(images()).maps, strict=True))


@pytest.mark.parametrize("kind", ["cnn", "vit"])
def test_a_captured_graph_says_the_same_in_onnx_runtime(kind, tmp_path):
    preprocessing = Preprocessing(image_size=(SIDE, SIDE), channels=3, mean=(0.5,) * 3, std=(0.5,) * 3)
    pixels = np.random.default_rng(0).integers(0, 256, (16, SIDE, SIDE, 3), np.uint8)
    source = ArraySource(pixels, np.zeros(16, np.int64), NAMES, DataPlan(name="images", image_size=SIDE), "noise")
    capture(made(kind, 0.5), kind, preprocessing, NAMES, Split(source, np.arange(16)), tmp_path)
    found = check_graph(GraphCheck(folder=tmp_path, profile=find_profile("cpu-onnxruntime")))
    assert found.samples == sum(CHECKED_BATCHES)
    assert found.relative_error < 1e-4


@pytest.mark.parametrize(("name", "reason"), [("Doubling", "cannot be pruned"), ("Narrow", "nothing to prune")])
def test_a_network_that_cannot_be_pruned_is_named_with_what_to_do(name, reason):
    with pytest.raises(ModelError, match=f"test_pruning:{name} .*{reason}|test_pruning:{name} has {reason}") as caught:
        build_model(ModelPlan(model=f"test_pruning:{name}", prune=0.5), CLASSES, 3, (SIDE, SIDE))
    assert "prune = 0" in caught.value.action


def test_keys_follow_the_share_and_are_the_old_ones_without_it():
    plain, small = ModelPlan(**CNN), ModelPlan(**CNN, prune=0.5)
    assert "prune" not in canonical(plain)
    assert "prune" not in plain.model_dump()
    assert "prune" not in TeacherPlan(**CNN).decisive()
    assert TeacherPlan(**CNN, prune=0.5).decisive()["prune"] == 0.5
    assert digest(plain) != digest(small)
    assert pruned_inputs(plain) == {}
    assert pruned_inputs(small) == {"prune": 0.5}
    assert code_identity(plain) != code_identity(small)


def test_a_layer_of_small_groups_does_not_lose_many_times_its_share():
    """Rounded down to multiples of eight per group, a tenth of 16 channels would be half of them."""
    whole, cut = (build_model(ModelPlan(model="timm:regnety_002", prune=share), CLASSES, 3, (SIDE, SIDE)) for share in (0.0, 0.1))
    before, after = shapes(whole), shapes(cut)
    assert before != after
    assert all(after[key][0] >= 0.8 * size[0] for key, size in before.items() if size and key != "head.fc.weight")
