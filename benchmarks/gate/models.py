"""Real networks with a tunable slowdown: the same trunk, and so many more small convolutions behind it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

from fofa_deploy.backend import float_recipe, get_backend
from fofa_deploy.types import Graph, HardwareProfile, Preprocessing, Sidecar, TensorSpec

SIDE, CHANNELS, CLASSES, TRUNK = 32, 16, 10, 7
PREPROCESSING = Preprocessing(image_size=(SIDE, SIDE), channels=3, mean=(0.5,) * 3, std=(0.25,) * 3)


def write_artifact(out: Path, profile: HardwareProfile, extra: int, note: str) -> Path:
    """Build the network with ``extra`` small layers for a profile; ``note`` makes the file another one, and nothing else.

    Returns:
        The artifact's folder, with golden inputs in it.
    """
    folder = out / f"{profile.runtime}-{extra}-{note}"
    if (folder / "golden.npz").is_file():
        return folder
    graph = _write_graph(out / "graphs" / f"{extra}-{note}", extra, note)
    backend = get_backend(profile.runtime)
    folder.mkdir(parents=True, exist_ok=True)
    backend.build(graph, float_recipe(backend, profile, graph), None, folder)
    images = PREPROCESSING.apply(np.random.default_rng(1).integers(0, 256, (1, 3, SIDE, SIDE), np.uint8))
    np.savez(folder / "golden.npz", images=images)
    return folder


def _write_graph(folder: Path, extra: int, note: str) -> Graph:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    nodes: list[onnx.NodeProto] = []
    constants: list[onnx.TensorProto] = []

    def convolve(source: str, channels: int, stride: int = 1) -> str:
        number = len(constants)
        weights = rng.standard_normal((CHANNELS, channels, 3, 3)) * np.sqrt(2 / (9 * channels))
        constants.append(numpy_helper.from_array(weights.astype(np.float32), f"w{number}"))
        options = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "strides": [stride, stride]}
        nodes.append(helper.make_node("Conv", [source, f"w{number}"], [f"c{number}"], f"conv{number}", **options))
        nodes.append(helper.make_node("Relu", [f"c{number}"], [f"r{number}"], f"relu{number}"))
        return f"r{number}"

    last = convolve("images", 3)
    for _ in range(TRUNK):
        last = convolve(last, CHANNELS)
    last = convolve(convolve(last, CHANNELS, 2), CHANNELS, 2)
    for _ in range(extra):
        last = convolve(last, CHANNELS)
    nodes.append(helper.make_node("GlobalAveragePool", [last], ["pooled"], "pool"))
    nodes.append(helper.make_node("Flatten", ["pooled"], ["flat"], "flatten"))
    constants.append(numpy_helper.from_array(rng.standard_normal((CHANNELS, CLASSES)).astype(np.float32), "dense"))
    nodes.append(helper.make_node("MatMul", ["flat", "dense"], ["logits"], "head"))
    return _saved(folder, nodes, constants, note)


def _saved(folder: Path, nodes: list[onnx.NodeProto], constants: list[onnx.TensorProto], note: str) -> Graph:
    tensor = helper.make_tensor_value_info
    sides = [tensor("images", 1, ["batch", 3, SIDE, SIDE]), tensor("logits", 1, ["batch", CLASSES])]
    graph = helper.make_graph(nodes, f"trunk-{note}", sides[:1], sides[1:], constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), folder / "model.onnx")
    sidecar = Sidecar(
        model="trunk",
        input=TensorSpec(name="images", shape=(None, 3, SIDE, SIDE)),
        output=TensorSpec(name="logits", shape=(None, CLASSES)),
        preprocessing=PREPROCESSING,
        class_names=tuple(map(str, range(CLASSES))),
    )
    (folder / "sidecar.json").write_text(sidecar.model_dump_json())
    return Graph.load(folder)
