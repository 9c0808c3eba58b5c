"""Two small captured networks with their calibration images and PyTorch's own answers, made once per session."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
import timm
import torch
from numpy.typing import NDArray
from torch import nn

from fofa_deploy.backend import Backend, backend_names, get_backend
from fofa_deploy.profile import find_profile, installed_profiles
from fofa_deploy.types import Artifact, Calibration, Feeds, Graph, HardwareProfile, Preprocessing, Recipe, Sidecar, TensorSpec

SIZE, CLASSES, BATCHES = 32, 10, (1, 2, 8)
KINDS = ("cnn", "vit")
PREPROCESSING = Preprocessing(image_size=(SIZE, SIZE), channels=3, mean=(0.5,) * 3, std=(0.5,) * 3)


@dataclass(frozen=True)
class Captured:
    """A graph, what calibrates it, and inputs (24,3,32,32) with PyTorch's logits (24,10)."""

    graph: Graph
    calibration: Calibration
    inputs: NDArray[np.float32]
    logits: NDArray[np.float32]


@dataclass(frozen=True)
class Built:
    backend: Backend
    profile: HardwareProfile
    captured: Captured
    artifact: Artifact


def images(count: int, seed: int) -> NDArray[np.uint8]:
    """Noisy versions (B,3,32,32) of one smooth pattern per class, classes in turn."""
    patterns = torch.rand(CLASSES, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    rng = torch.Generator().manual_seed(seed)
    coarse = patterns[torch.arange(count) % CLASSES] + 0.07 * torch.randn(count, 3, 5, 5, generator=rng)
    smooth = nn.functional.interpolate(coarse, size=(SIZE, SIZE), mode="bilinear", align_corners=False)
    noisy = smooth + 0.05 * torch.randn(smooth.shape, generator=rng)
    return (noisy.clamp(0, 1) * 255).to(torch.uint8).numpy()


def _cnn() -> nn.Module:
    return timm.create_model("test_resnet", num_classes=CLASSES)


def _vit() -> nn.Module:
    options = {"img_size": SIZE, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 4}
    return timm.models.VisionTransformer(**options, num_classes=CLASSES)


def _seeded(make: Callable[[], nn.Module]) -> nn.Module:
    """Weights from a seed, and batch statistics from data, without which every activation vanishes or explodes; of timm's
    networks a head that is sure."""
    torch.manual_seed(0)
    model = make().train()
    with torch.no_grad():
        for seed in range(8):
            model(torch.from_numpy(PREPROCESSING.apply(images(32, 100 + seed))))
    return _confident(model.eval()) if hasattr(model, "forward_head") else model.eval()


def _confident(model: nn.Module) -> nn.Module:
    """Give it the head that training would find: an untrained one leaves near ties, where agreement means nothing."""
    inputs = torch.from_numpy(PREPROCESSING.apply(images(25 * CLASSES, 7)))
    with torch.no_grad():
        features = model.forward_head(model.forward_features(inputs), pre_logits=True)
        means = torch.stack([features[index::CLASSES].mean(0) for index in range(CLASSES)])
        directions = means - means.mean(0)
        directions *= 10 / directions.square().sum(1).mean()
        model.get_classifier().weight.copy_(directions)
        model.get_classifier().bias.copy_(-(directions * (means + means.mean(0)) / 2).sum(1))
    return model


def _export(model: nn.Module, path: Path) -> None:
    example = torch.from_numpy(PREPROCESSING.apply(images(2, 1)))
    options = {"input_names": ["images"], "output_names": ["logits"], "external_data": False, "verbose": False}
    dynamic = ({0: torch.export.Dim("batch", min=1, max=64)},)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (example,), path, dynamo=True, opset_version=18, dynamic_shapes=dynamic, **options)


def sidecar(name: str) -> Sidecar:
    source, target = TensorSpec(name="images", shape=(None, 3, SIZE, SIZE)), TensorSpec(name="logits", shape=(None, CLASSES))
    names = tuple(f"class {index}" for index in range(CLASSES))
    return Sidecar(model=name, input=source, output=target, preprocessing=PREPROCESSING, class_names=names)


def write_sidecar(folder: Path, name: str) -> None:
    (folder / "sidecar.json").write_text(sidecar(name).model_dump_json())


def _capture(make: Callable[[], nn.Module], folder: Path) -> Captured:
    model = _seeded(make)
    _export(model, folder / "model.onnx")
    write_sidecar(folder, folder.name)
    np.save(folder / "calibration.npy", images(64, 3))
    calibration = Calibration(images=folder / "calibration.npy", sidecar=sidecar(folder.name))
    inputs = PREPROCESSING.apply(images(24, 4))
    with torch.no_grad():
        logits = model(torch.from_numpy(inputs)).numpy()
    return Captured(Graph.load(folder), calibration, inputs, logits)


@pytest.fixture(scope="session")
def captured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Captured]:
    root = tmp_path_factory.mktemp("captured")
    for kind in KINDS:
        (root / kind).mkdir()
    return {"cnn": _capture(_cnn, root / "cnn"), "vit": _capture(_vit, root / "vit")}


@pytest.fixture(scope="session")
def build(captured: dict[str, Captured], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str, str], Built]:
    """(back end or profile, kind, recipe name) -> what it built, once per session. Skips where it cannot build, with its reason."""
    done: dict[tuple[str, str, str], Built] = {}

    def once(name: str, kind: str, recipe_name: str) -> Built:
        if (name, kind, recipe_name) not in done:
            done[name, kind, recipe_name] = _build(name, captured[kind], recipe_name, tmp_path_factory.mktemp("built"))
        return done[name, kind, recipe_name]

    return once


def _build(name: str, captured: Captured, recipe_name: str, out: Path) -> Built:
    profile = profile_for(name)
    backend = get_backend(profile.runtime)
    probe = backend.probe(profile)
    if not probe.can_build:
        pytest.skip(f"{name} cannot build here: {probe.reason}")
    recipe = {recipe.name: recipe for recipe in backend.recipes(profile, captured.graph)}[recipe_name]
    artifact = backend.build(captured.graph, recipe, captured.calibration, out)
    return Built(backend, profile, captured, artifact)


def profile_for(name: str) -> HardwareProfile:
    """A shipped profile, or the first one of a back end that can be built here, else its first, asking for all the back end can do.

    A back end from elsewhere, which ships none with us, gets a plain one.
    """
    if name not in backend_names():
        return _thorough(find_profile(name))
    backend = get_backend(name)
    plain = HardwareProfile(name=name, description=name, runtime=name, precisions=tuple(sorted(backend.precisions)))
    mine = [profile for profile in installed_profiles() if profile.runtime == name] or [plain]
    return _thorough(next((profile for profile in mine if backend.probe(profile).can_build), mine[0]))


def _thorough(profile: HardwareProfile) -> HardwareProfile:
    execution = profile.execution.model_copy(update={"batch_sizes": BATCHES, "threads": 2, "spinning": False})
    precisions = tuple(sorted(get_backend(profile.runtime).precisions))
    return profile.model_copy(update={"precisions": precisions, "execution": execution})


def stand_in(kind: str, folder: Path) -> Graph:
    """A graph of two nodes that is enough of a CNN or a transformer to ask for its recipes."""
    operator, weight_shape = ("Conv", [CLASSES, 3, SIZE, SIZE]) if kind == "cnn" else ("LayerNormalization", [SIZE])
    weight = onnx.numpy_helper.from_array(np.ones(weight_shape, np.float32), "weight")
    nodes = [
        onnx.helper.make_node(operator, ["images", "weight"], ["hidden"], name="first"),
        onnx.helper.make_node("Flatten", ["hidden"], ["logits"], name="second"),
    ]
    values = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)
        for name, shape in (("images", ["batch", 3, SIZE, SIZE]), ("logits", ["batch", None]))
    ]
    model = onnx.helper.make_model(
        onnx.helper.make_graph(nodes, kind, values[:1], values[1:], [weight]), opset_imports=[onnx.helper.make_opsetid("", 18)]
    )
    onnx.save(model, folder / "model.onnx")
    write_sidecar(folder, kind)
    return Graph.load(folder)


def run_in_batches(session: object, inputs: NDArray[np.float32], size: int) -> NDArray[np.float32]:
    """Logits (B,10) of a session that is given ``size`` images at a time."""
    run: Callable[[Feeds], Feeds] = session.run
    return np.concatenate([run({"images": inputs[start : start + size]})["logits"] for start in range(0, len(inputs), size)])


def recipe_named(backend: Backend, profile: HardwareProfile, graph: Graph, name: str) -> Recipe:
    return next(recipe for recipe in backend.recipes(profile, graph) if recipe.name == name)
