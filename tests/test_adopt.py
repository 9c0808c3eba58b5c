"""Ready-made ONNX files: what their artifacts are held to is right, whatever a runtime makes of the file."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import tiny
from onnx import helper
from onnx.reference import ReferenceEvaluator

from fofa_deploy.adopt import Preparation, adopt
from fofa_deploy.config import AccuracyPlan, LimitsPlan, MeasurePlan
from fofa_deploy.errors import GraphError
from fofa_deploy.profile import find_profile
from fofa_deploy.progress import Quiet
from fofa_deploy.store import Store
from fofa_deploy.tune import Settings
from fofa_deploy.types import Budget, Status
from fofa_deploy.verify import GraphCheck, check_graph

CHANNELS, SIDE, CLASSES = 8, 4, 3
SETTINGS = Settings(AccuracyPlan(), MeasurePlan(), LimitsPlan(), Budget(), 0, "fp32")


def pooled_by_attention() -> onnx.ModelProto:
    """One query for all images: onnxruntime 1.32 transposes the keys on the wrong side of their product with a vector."""
    rng = np.random.default_rng(0)
    tensors = {
        "weight": rng.normal(size=(CHANNELS, 1, 1, 1)),
        "query": rng.normal(size=CHANNELS),
        "head": rng.normal(size=(CHANNELS, CLASSES)),
    }
    shapes = {"rows": [0, CHANNELS, SIDE * SIDE], "second": [1]}
    nodes = [
        helper.make_node("Conv", ["images", "weight"], ["maps"], "conv"),
        helper.make_node("Reshape", ["maps", "rows"], ["columns"], "flatten"),
        helper.make_node("Transpose", ["columns"], ["tokens"], "turn", perm=[0, 2, 1]),
        helper.make_node("MatMul", ["tokens", "query"], ["scores"], "ask"),
        helper.make_node("Softmax", ["scores"], ["shares"], "weigh", axis=-1),
        helper.make_node("Unsqueeze", ["shares", "second"], ["row"], "row"),
        helper.make_node("MatMul", ["row", "tokens"], ["token"], "pool"),
        helper.make_node("Squeeze", ["token", "second"], ["vector"], "vector"),
        helper.make_node("MatMul", ["vector", "head"], ["logits"], "head"),
    ]
    ends = [
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["N", *shape])
        for name, shape in (("images", (1, SIDE, SIDE)), ("logits", (CLASSES,)))
    ]
    kept = [onnx.numpy_helper.from_array(value.astype(np.float32), name) for name, value in tensors.items()]
    kept += [onnx.numpy_helper.from_array(np.array(value), name) for name, value in shapes.items()]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], kept)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def error_in_onnxruntime(model: onnx.ModelProto) -> float:
    """Relative, against numpy."""
    images = {"images": tiny.PREPROCESSING.apply(tiny.pixels(8))}
    answered = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, images)[0]
    (expected,) = ReferenceEvaluator(model).run(None, images)
    return float(np.linalg.norm(answered - expected) / np.linalg.norm(expected))


def test_a_file_that_onnxruntime_runs_wrong_is_held_to_what_is_in_it(tmp_path):
    model = pooled_by_attention()
    onnx.save(model, tmp_path / "model.onnx")
    with Store(tmp_path / "store") as store:
        tuner = adopt(store, tmp_path / "model.onnx", None, Preparation(), Quiet(), SETTINGS)
        (right,) = tuner.attempt(find_profile("cpu-openvino"))
        (suspect,) = tuner.attempt(find_profile("cpu-onnxruntime"))
    assert right.status is Status.VERIFIED, right.reason
    wrong = error_in_onnxruntime(model) > 1e-3
    assert (suspect.status is Status.REJECTED) == wrong
    assert any("onnxruntime runs model.onnx wrong" in notice for notice in store.notices) == wrong


def test_a_right_graph_is_not_blamed_for_a_wrong_runtime(tmp_path):
    tiny.write_graph(tmp_path)
    model = pooled_by_attention()
    if error_in_onnxruntime(model) < 1e-3:
        pytest.skip("this onnxruntime runs the graph right")
    onnx.save(model, tmp_path / "model.onnx")
    images = tiny.PREPROCESSING.apply(tiny.pixels(8))
    (logits,) = ReferenceEvaluator(model).run(None, {"images": images})
    np.savez(tmp_path / "golden.npz", images=images, logits=logits)
    with pytest.raises(GraphError, match="does not where numpy evaluates it: onnxruntime runs it wrong"):
        check_graph(GraphCheck(folder=tmp_path, profile=find_profile("cpu-onnxruntime")))


def test_without_images_it_is_told_what_the_test_is_worth(tmp_path):
    tiny.write_graph(tmp_path)
    with Store(tmp_path / "store") as store:
        adopt(store, tmp_path / "model.onnx", None, Preparation(), Quiet(), SETTINGS)
    assert store.notices == ["no --images: nothing is calibrated, and all is judged by 8 images of noise, a weak test"]
