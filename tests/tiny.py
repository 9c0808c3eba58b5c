"""The smallest real things that tests share: a graph of one matrix product, its artifact, its images."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx

from fofa_deploy.backend import get_backend
from fofa_deploy.profile import find_profile
from fofa_deploy.types import Graph, Preprocessing, Sidecar, TensorSpec

SIDE, CLASSES = 4, 3
PREPROCESSING = Preprocessing(image_size=(SIDE, SIDE), channels=1, mean=(0.5,), std=(0.5,))


def weights() -> np.ndarray:
    """float32 (SIDE*SIDE,CLASSES)"""
    return np.random.default_rng(0).standard_normal((SIDE * SIDE, CLASSES)).astype(np.float32)


def write_graph(folder: Path) -> Graph:
    """A captured graph, logits (B,3) = pixels (B,1,4,4) @ weights, with golden inputs and outputs."""
    folder.mkdir(parents=True, exist_ok=True)
    make = onnx.helper
    values = [
        make.make_tensor_value_info("images", onnx.TensorProto.FLOAT, ["batch", 1, SIDE, SIDE]),
        make.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, ["batch", CLASSES]),
    ]
    nodes = [
        make.make_node("Flatten", ["images"], ["flat"], "flatten"),
        make.make_node("MatMul", ["flat", "w"], ["logits"], "dense"),
    ]
    graph = make.make_graph(nodes, "tiny", values[:1], values[1:], [onnx.numpy_helper.from_array(weights(), "w")])
    onnx.save(make.make_model(graph, opset_imports=[make.make_opsetid("", 18)], ir_version=9), folder / "model.onnx")
    sidecar = Sidecar(
        model="tiny",
        input=TensorSpec(name="images", shape=(None, 1, SIDE, SIDE)),
        output=TensorSpec(name="logits", shape=(None, CLASSES)),
        preprocessing=PREPROCESSING,
        class_names=("a", "b", "c"),
    )
    (folder / "sidecar.json").write_text(sidecar.model_dump_json())
    images = PREPROCESSING.apply(pixels(8))
    np.savez(folder / "golden.npz", images=images, logits=images.reshape(8, -1) @ weights())
    return Graph.load(folder)


def pixels(count: int) -> np.ndarray:
    """uint8 (count,1,4,4)"""
    return np.random.default_rng(1).integers(0, 256, (count, 1, SIDE, SIDE), np.uint8)


def build(graph: Graph, profile_name: str, out: Path) -> Path:
    """The folder of the graph's fp32 artifact."""
    backend, profile = get_backend(find_profile(profile_name).runtime), find_profile(profile_name)
    out.mkdir(parents=True)
    recipe = next(r for r in backend.recipes(profile, graph) if r.precision == "fp32")
    backend.build(graph, recipe, None, out)
    return out


def python(code: str, *arguments: object, **options: object) -> subprocess.Popen[str]:
    """A process of this interpreter, with text pipes."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options}
    return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], **pipes)  # type: ignore[call-overload]


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


def run_cli(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """``fofa-deploy`` in a process of its own, on a wide screen."""
    command = [sys.executable, "-m", "fofa_deploy", *map(str, arguments)]
    environment = {**os.environ, "COLUMNS": "300", "NO_COLOR": "1"}
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, timeout=120, check=False)
