"""OpenVINO's traps: precisions the device does not have, and devices that choose themselves."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import openvino as ov
import pytest
import torch
from onnx import helper, numpy_helper
from torch import nn

from fofa_deploy.backend import get_backend
from fofa_deploy.errors import BackendError, BuildError
from fofa_deploy.types import Device, HardwareProfile, Precision
from fofa_exporters import openvino
from fofa_exporters._quantization import Scheme, quantized

from .conftest import Built, Captured, _capture, profile_for, run_in_batches


def _has_bf16() -> bool:
    return "BF16" in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def _on(name: str) -> HardwareProfile:
    return profile_for("openvino").model_copy(update={"device": Device(kind="cpu", name=name)})


def test_bf16_is_offered_only_where_the_cpu_has_it(captured: dict[str, Captured]):
    offered = {recipe.precision for recipe in get_backend("openvino").recipes(_on("CPU"), captured["cnn"].graph)}
    assert (Precision.BF16 in offered) == _has_bf16()


@pytest.mark.parametrize("recipe", [openvino.BF16, openvino.FP16], ids=["bf16", "fp16"])
def test_a_precision_the_cpu_lacks_is_refused(recipe: object, captured: dict[str, Captured], tmp_path: Path):
    if _has_bf16():
        pytest.skip("this CPU has bf16")
    with pytest.raises(BuildError, match="runs f32 where"):
        get_backend("openvino").build(captured["cnn"].graph, openvino._on(recipe, "CPU"), None, tmp_path)


class _Determined(nn.Module):
    """With an operator that OpenVINO does not have."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 10, 3, stride=16, padding=1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.linalg.det(self.stem(images))


@pytest.mark.parametrize("kind", ["fp32", "int8-qdq", "int8-nncf"])
def test_an_operator_that_is_not_there_is_named(kind: str, tmp_path: Path):
    found, backend, profile = _capture(_Determined, tmp_path), get_backend("openvino"), profile_for("openvino")
    recipe = next(recipe for recipe in backend.recipes(profile, found.graph) if recipe.name.startswith(kind))
    with pytest.raises(BuildError, match=r"OpenVINO cannot build .*: No conversion rule found for operations: Det-\d+\n  -> "):
        backend.build(found.graph, recipe, found.calibration, tmp_path)


@pytest.mark.parametrize(
    "way", ["from fofa_exporters.openvino import ov", "from fofa_deploy.runner.runtimes import openvino; ov = openvino()"]
)
def test_nothing_is_reported_to_openvino_s_maker(way: str, captured: dict[str, Captured], tmp_path: Path):
    """Its telemetry keeps an identifier of the user's in their home."""
    convert = f"{way}; ov.convert_model({str(captured['cnn'].graph.path)!r})"
    environment = {**os.environ, "HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", convert], check=True, env=environment, stdout=subprocess.DEVNULL)
    assert not (tmp_path / "intel").exists()


@pytest.mark.parametrize("device", ["AUTO", "AUTO:CPU", "MULTI:CPU", "HETERO:CPU", "BATCH:CPU", "auto"])
def test_virtual_devices_are_refused(device: str, build: Callable[[str, str, str], Built]):
    built = build("openvino", "cnn", "fp32")
    assert "silently" in built.backend.probe(_on(device)).reason
    with pytest.raises(BackendError, match="silently"):
        built.backend.load(built.artifact, _on(device))


def test_missing_device_is_refused(build: Callable[[str, str, str], Built]):
    built = build("openvino", "cnn", "fp32")
    probe = built.backend.probe(_on("GPU.7"))
    assert not probe.can_run
    assert "GPU.7" in probe.reason
    with pytest.raises(BackendError, match=r"GPU\.7"):
        built.backend.load(built.artifact, _on("GPU.7"))


def test_a_refusal_says_what_is_refused_first(tmp_path: Path):
    make = onnx.helper
    float32 = onnx.TensorProto.FLOAT
    images, pooled = (make.make_tensor_value_info(name, float32, [None, 1, 1, 1]) for name in ("images", "pooled"))
    pool = make.make_node("AveragePool", ["images"], ["pooled"], kernel_shape=[2, 2], ceil_mode=1)
    file = tmp_path / "model.onnx"
    onnx.save(make.make_model(make.make_graph([pool], "g", [images], [pooled]), opset_imports=[make.make_opsetid("", 18)]), file)
    with pytest.raises(BackendError) as caught:
        get_backend("openvino").describe_file(file, _on("CPU"))
    assert "AveragePool" in caught.value.message.partition("\n")[0]


def test_artifact_is_ir_and_nothing_compiled(build: Callable[[str, str, str], Built]):
    artifact = build("openvino", "cnn", "int8-nncf").artifact
    assert [record.path for record in artifact.files] == ["model.xml", "model.bin"]


@pytest.mark.parametrize("rest", [Precision.FP32, Precision.BF16])
def test_transformer_keeps_fewer_layers_in_float_than_weighted_ones(build: Callable[[str, str, str], Built], rest: Precision):
    if rest is Precision.BF16 and not _has_bf16():
        pytest.skip("this CPU does not compute in bf16")
    artifact = build("openvino", "vit", f"int8-nncf-transformer{'' if rest is Precision.FP32 else '-bf16'}").artifact
    assert {layer.precision for layer in artifact.layers if layer.operator == "MVN"} == {rest}
    assert {layer.precision for layer in artifact.layers if layer.operator == "FullyConnected"} == {Precision.INT8}


def test_quantizing_is_silent(captured: dict[str, Captured], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    backend, profile = get_backend("openvino"), profile_for("openvino")
    recipe = backend.recipes(profile, captured["cnn"].graph)[0]
    backend.build(captured["cnn"].graph, recipe, captured["cnn"].calibration, tmp_path)
    assert capsys.readouterr().out == ""


ENDING = """
import faulthandler, signal, subprocess, sys
from pathlib import Path
from fofa_deploy.backend import get_backend
from fofa_deploy.profile import find_profile
from fofa_deploy.types import Artifact, Calibration, Graph

faulthandler.enable()  # gives the thread a stack for handlers, as pytest does
signal.signal(signal.SIGCHLD, lambda *_: print("a child ended"))  # as data loaders with workers do
folders, profile, backend = [Path(folder) for folder in sys.argv[1:]], find_profile("cpu-openvino"), get_backend("openvino")
{}
subprocess.run([sys.executable, "-c", ""], check=True)
print("still here")
"""

OVERLAPPING = """
artifact = Artifact.load(folders[0])
first, second = backend.load(artifact, profile), backend.load(artifact, profile)
with first:
    pass
del first
with second:
    pass
del second
"""

CONTROLLED = """
graph = Graph.load(folders[0])
recipe = next(recipe for recipe in backend.recipes(profile, graph) if recipe.name == "int8-nncf-accuracy-control")
backend.build(graph, recipe, Calibration(images=folders[0] / "calibration.npy", sidecar=graph.sidecar), folders[1])
"""


def _survives(code: str, *folders: Path) -> None:
    command = [sys.executable, "-c", ENDING.format(code), *map(str, folders)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    assert "a child ended" in ended.stdout
    assert ended.stdout.endswith("still here\n")


def test_sessions_may_end_in_any_order(build: Callable[[str, str, str], Built]):
    _survives(OVERLAPPING, build("openvino", "cnn", "fp32").artifact.folder)


def test_cores_of_accuracy_control_do_no_harm(captured: dict[str, Captured], tmp_path: Path):
    _survives(CONTROLLED, captured["cnn"].graph.path.parent, tmp_path)


class _Watched:
    """OpenVINO's core, and what it was told to compile with."""

    def __init__(self) -> None:
        self._core, self.told = openvino._core(), []

    def compile_model(self, model: object, device: str, config: dict[str, object]) -> object:
        self.told.append(config.get(openvino.RUNTIME_CACHE))
        return self._core.compile_model(model, device, config)

    def __getattr__(self, name: str) -> object:
        return getattr(self._core, name)


def test_the_cache_that_mixes_up_batch_sizes_is_left_out_where_they_change(
    build: Callable[[str, str, str], Built], monkeypatch: pytest.MonkeyPatch
):
    built, watched = build("openvino", "cnn", "fp32"), _Watched()
    monkeypatch.setattr(openvino, "_core", lambda: watched)
    profile = profile_for("openvino")
    fixed = profile.execution.batch_sizes[0]
    with get_backend("openvino").load(built.artifact, profile) as session:
        for size in (fixed, max(profile.execution.batch_sizes) + 1):
            run_in_batches(session, built.captured.inputs[:size], size)
    assert watched.told == [None, 0]


def test_depthwise_convolutions_are_in_int8_too(captured: dict[str, Captured]):
    """Their weights are reshaped in between, where NNCF's steps would stay apart from them."""
    calibration, rng = captured["cnn"].calibration, np.random.default_rng(0)
    shapes = {"dense": (8, 3, 3, 3), "depthwise": (8, 1, 3, 3), "head": (10, 8, 1, 1)}
    weights = [numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name) for name, shape in shapes.items()]
    nodes = [
        helper.make_node("Conv", [calibration.sidecar.input.name, "dense"], ["a"], name="one", pads=[1] * 4),
        helper.make_node("Relu", ["a"], ["b"], name="two"),
        helper.make_node("Conv", ["b", "depthwise"], ["c"], name="three", group=8, pads=[1] * 4),
        helper.make_node("Relu", ["c"], ["d"], name="four"),
        helper.make_node("Conv", ["d", "head"], ["e"], name="five"),
    ]
    ends = [
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", channels, 32, 32])
        for name, channels in ((calibration.sidecar.input.name, 3), ("e", 10))
    ]
    source = helper.make_model(
        helper.make_graph(nodes, "g", ends[:1], ends[1:], weights), opset_imports=[helper.make_opsetid("", 18)]
    )
    model = openvino._read(source, openvino._nncf(Precision.FP32, transformer=False), calibration)
    compiled = openvino._core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    assert [row.precision for row in openvino.layer_table(compiled) if row.weighted] == [Precision.INT8] * 3


def test_a_concatenation_before_a_batch_norm_is_not_rounded_again(captured: dict[str, Captured]):
    """OpenVINO dies of it: see what leaves such concatenations out."""
    calibration, rng = captured["cnn"].calibration, np.random.default_rng(0)
    name = calibration.sidecar.input.name
    shapes = {"first": (8, 3, 3, 3), "second": (8, 8, 3, 3), "third": (8, 16, 1, 1)}
    tensors = [numpy_helper.from_array(rng.normal(size=shape).astype(np.float32), key) for key, shape in shapes.items()]
    norm = {key: rng.uniform(0.5, 1.5, 16).astype(np.float32) for key in ("scale", "shift", "mean", "variance")}
    tensors += [numpy_helper.from_array(values, key) for key, values in norm.items()]
    nodes = [
        helper.make_node("Conv", [name, "first"], ["a"], name="one", pads=[1] * 4),
        helper.make_node("Relu", ["a"], ["b"], name="two"),
        helper.make_node("Conv", ["b", "second"], ["c"], name="three", pads=[1] * 4),
        helper.make_node("Concat", ["b", "c"], ["d"], name="four", axis=1),
        helper.make_node("BatchNormalization", ["d", *norm], ["e"], name="five"),
        helper.make_node("Relu", ["e"], ["f"], name="six"),
        helper.make_node("Conv", ["f", "third"], ["g"], name="seven"),
    ]
    ends = [
        helper.make_tensor_value_info(end, onnx.TensorProto.FLOAT, ["batch", channels, 32, 32])
        for end, channels in ((name, 3), ("g", 8))
    ]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], tensors)
    source = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    written = quantized(source, calibration, Scheme())
    assert "d" not in {node.input[0] for node in written.graph.node if node.op_type == "QuantizeLinear"}
    recipe = openvino._pairs(Precision.FP32, weighted_only=False, seven_bit_weights=True)
    model = openvino._read(source, recipe, calibration)
    compiled = openvino._core().compile_model(openvino._sized(model, 1), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    assert [row.precision for row in openvino.layer_table(compiled) if row.weighted] == [Precision.INT8] * 3


def test_windows_are_gathered_from_maps_with_a_scale_per_channel(captured: dict[str, Captured]):
    """As halo attention does; OpenVINO forgets the axes that a table of places adds."""
    calibration, rng = captured["cnn"].calibration, np.random.default_rng(0)
    name, table = calibration.sidecar.input.name, np.arange(0, 24, 8)[:, None] + np.arange(8)
    tensors = [
        numpy_helper.from_array(rng.normal(size=(8, 3, 3, 3)).astype(np.float32), "kernel"),
        numpy_helper.from_array(table, "table"),
    ]
    nodes = [
        helper.make_node("Conv", [name, "kernel"], ["maps"], name="one", pads=[1] * 4),
        helper.make_node("Gather", ["maps", "table"], ["windows"], name="two", axis=2),
    ]
    ends = [
        helper.make_tensor_value_info(end, onnx.TensorProto.FLOAT, ["batch", *sides])
        for end, sides in ((name, (3, 32, 32)), ("windows", (8, 3, 8, 32)))
    ]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], tensors)
    source = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    model = openvino._read(source, openvino._pairs(Precision.FP32, weighted_only=True, seven_bit_weights=True), calibration)
    compiled = openvino._core().compile_model(openvino._sized(model, 2), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    assert [row.precision for row in openvino.layer_table(compiled) if row.weighted] == [Precision.INT8]
    images = captured["cnn"].inputs[:2]
    expected = ort.InferenceSession(source.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, {name: images})[0]
    assert np.linalg.norm(compiled({name: images})[0] - expected) < 0.05 * np.linalg.norm(expected)


def test_accuracy_control_gives_back_layers_until_answers_are_kept(captured: dict[str, Captured], tmp_path: Path):
    found, profile, backend = captured["cnn"], profile_for("openvino"), get_backend("openvino")
    plain, controlled = (
        next(recipe for recipe in backend.recipes(profile, found.graph) if recipe.name.startswith(name))
        for name in ("int8-nncf", "int8-nncf-accuracy-control")
    )
    assert (plain.on_request, controlled.on_request) == (False, True)
    artifact = backend.build(found.graph, controlled, found.calibration, tmp_path)
    images = np.load(found.calibration.images)
    feeds = {found.graph.sidecar.input.name: found.graph.sidecar.prepare(images)}
    answers = [
        backend.load(built, profile).run(feeds)[found.graph.sidecar.output.name].argmax(1)
        for built in (artifact, backend.build(found.graph, openvino._on(openvino.FP32, "CPU"), None, _folder(tmp_path / "float")))
    ]
    assert np.mean(answers[0] == answers[1]) >= 0.99


def _folder(path: Path) -> Path:
    path.mkdir()
    return path
