"""TensorRT's traps: engines that are silently fp32, Q/DQ the parser cannot take, and engines from elsewhere."""

from __future__ import annotations

import ctypes
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import onnx
import pytest

from fofa_deploy.backend import get_backend
from fofa_deploy.errors import BackendError, BuildError, IntegrityError
from fofa_deploy.profile import find_profile
from fofa_deploy.types import Artifact, Precision
from fofa_exporters import _device, _typed, tensorrt

from .conftest import Built, Captured, profile_for, recipe_named

NAME, INT8 = "tensorrt-rtx", "int8-qdq-symmetric"


def _types(artifact: Artifact) -> Counter[tuple[str, str]]:
    return Counter((layer.operator, layer.precision) for layer in artifact.layers)


def test_fp16_is_fp16(build: Callable[[str, str, str], Built]):
    half, full = build(NAME, "cnn", "fp16").artifact, build(NAME, "cnn", "fp32").artifact
    types = _types(half)
    assert types["CONVOLUTION", Precision.FP16] == _types(full)["CONVOLUTION", Precision.FP32] > 0
    assert types["CONVOLUTION", Precision.FP32] == 0
    assert half.size_bytes < 0.8 * full.size_bytes


@pytest.mark.parametrize("kind", ["cnn", "vit"])
def test_int8_has_quantize_and_dequantize_layers(kind: str, build: Callable[[str, str, str], Built]):
    types = _types(build(NAME, kind, INT8).artifact)
    weighted = [layer for layer in build(NAME, kind, INT8).artifact.layers if layer.weighted]
    assert {layer.precision for layer in weighted} == {Precision.INT8}
    assert types["QUANTIZE", Precision.INT8] >= len(weighted) / 2
    assert types["DEQUANTIZE", Precision.FP16] >= len(weighted), "what is not int8 is fp16"


def test_bf16_is_bf16(build: Callable[[str, str, str], Built]):
    weighted = [layer for layer in build(NAME, "vit", "bf16").artifact.layers if layer.weighted]
    assert {layer.precision for layer in weighted} == {Precision.BF16}


def test_nearly_dead_channels_are_quantized_by_steps_that_fp16_holds(captured: dict[str, Captured]):
    subject, profile = captured["cnn"], profile_for(NAME)
    recipe = recipe_named(get_backend(NAME), profile, subject.graph, INT8)
    model = onnx.load(subject.graph.path)
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    kernel = next(weights[node.input[1]] for node in model.graph.node if node.op_type == "Conv")
    values = onnx.numpy_helper.to_array(kernel).copy()
    values[0] *= 1e-8
    kernel.CopyFrom(onnx.numpy_helper.from_array(values, kernel.name))
    written = tensorrt._integer(model, recipe, subject.calibration)
    quantized = {node.input[1] for node in written.graph.node if node.op_type == "DequantizeLinear"}
    scales = [onnx.numpy_helper.to_array(tensor) for tensor in written.graph.initializer if tensor.name in quantized]
    assert {scale.dtype for scale in scales} == {np.dtype(np.float16)}
    assert min(scale.min() for scale in scales) >= _typed.SMALLEST_SCALE


def test_an_activation_without_bf16_works_between_casts():
    trt = pytest.importorskip("tensorrt_rtx")
    make, float32 = onnx.helper, onnx.TensorProto.FLOAT
    images, shown = (make.make_tensor_value_info(name, float32, ["N", 8, 8, 8]) for name in ("images", "shown"))
    weights = onnx.numpy_helper.from_array(np.ones((8, 8, 1, 1), np.float32), "weights")
    nodes = [
        make.make_node("Conv", ["images", "weights"], ["maps"], "conv"),
        make.make_node("HardSwish", ["maps"], ["shown"], "act"),
    ]
    graph = make.make_graph(nodes, "g", [images], [shown], [weights])
    model = make.make_model(graph, opset_imports=[make.make_opsetid("", 18)])
    _, layers = tensorrt._build_engine(trt, tensorrt._narrow(model, tensorrt.BF16, None), {})
    assert {layer.precision for layer in layers if layer.weighted} == {Precision.BF16}


def test_a_transposed_convolution_without_bf16_works_between_casts():
    trt = pytest.importorskip("tensorrt_rtx")
    make, float32 = onnx.helper, onnx.TensorProto.FLOAT
    images, shown = (
        make.make_tensor_value_info(name, float32, ["N", 8, *size]) for name, size in (("images", (8, 8)), ("shown", (16, 16)))
    )
    values = {"weights": np.ones((8, 8, 2, 2), np.float32), "bias": np.ones(8, np.float32)}
    tensors = [onnx.numpy_helper.from_array(value, name) for name, value in values.items()]
    node = make.make_node("ConvTranspose", ["images", *values], ["shown"], "up", strides=[2, 2])
    model = make.make_model(make.make_graph([node], "g", [images], [shown], tensors), opset_imports=[make.make_opsetid("", 18)])
    _, layers = tensorrt._build_engine(trt, tensorrt._narrow(model, tensorrt.BF16, None), {})
    assert [layer.precision for layer in layers if layer.weighted] == [Precision.FP32]


def test_attention_stays_float(build: Callable[[str, str, str], Built]):
    layers = build(NAME, "vit", INT8).artifact.layers
    products = [layer for layer in layers if layer.operator == "MATRIX_MULTIPLY" and not layer.weighted]
    assert len(products) == 4
    assert {layer.precision for layer in products} == {Precision.FP16}


def test_nothing_is_prepended_to_the_engine(build: Callable[[str, str, str], Built]):
    artifact = build(NAME, "cnn", "fp16").artifact
    assert [record.path for record in artifact.files] == ["model.engine"]
    assert not artifact.path.read_bytes().lstrip().startswith(b"{")


def test_profile_sets_the_largest_batch(build: Callable[[str, str, str], Built]):
    assert build(NAME, "cnn", "fp16").artifact.recipe.options["max_batch"] == 8


def test_engine_swapped_after_loading_is_refused(build: Callable[[str, str, str], Built], tmp_path: Path):
    artifact = build(NAME, "cnn", "fp16").artifact
    (tmp_path / "model.engine").write_bytes(artifact.path.read_bytes()[:-1] + b"\xff\x00")
    with pytest.raises(IntegrityError):
        tensorrt._engine_bytes(artifact.model_copy(update={"folder": tmp_path}))


def test_running_without_a_gpu_is_refused(build: Callable[[str, str, str], Built]):
    built = build(NAME, "cnn", "fp16")
    if built.backend.probe(built.profile).can_run:
        pytest.skip("there is a CUDA device")
    with pytest.raises(BackendError, match="no CUDA device"):
        built.backend.load(built.artifact, built.profile)


@pytest.mark.parametrize("name", ["tensorrt", "tensorrt-rtx"])
def test_a_missing_package_is_named_with_its_extra(name: str, monkeypatch: pytest.MonkeyPatch):
    backend = get_backend(name)
    monkeypatch.setattr(type(backend), "package", "no_such_package")
    probe = backend.probe(profile_for(name))
    assert not probe.can_build
    assert not probe.can_run
    assert f"pip install 'fofa-deploy[{name}]'" in probe.reason
    with pytest.raises(BackendError, match="does not import"):
        backend.runtime()


def test_the_parsers_own_words_reach_the_error(captured: dict[str, Captured]):
    trt = pytest.importorskip("tensorrt_rtx")
    import onnx

    model = onnx.load(captured["cnn"].graph.path)
    model.graph.node[0].op_type = "NoSuchOperator"
    with pytest.raises(BuildError, match="NoSuchOperator"):
        tensorrt._build_engine(trt, model, {})


def test_inspector_rows_are_read():
    """As TensorRT 10 writes them with DETAILED verbosity."""
    convolution = {
        "Name": "conv1",
        "LayerType": "CaskConvolution",
        "Outputs": [{"Name": "y", "Format/Datatype": "Thirty-two wide channel vectorized row major Int8 format"}],
        "Weights": {"Type": "Int8", "Count": 9408},
    }
    cast = {"Name": "cast", "LayerType": "Reformat", "Outputs": [{"Name": "z", "Format/Datatype": "Row major linear FP16 format"}]}
    brain = convolution | {"Weights": {"Type": "BFloat16", "Count": 9408}}
    back = cast | {"Outputs": [{"Name": "z", "Format/Datatype": "Row major linear BFloat16 format"}]}
    rows = tensorrt.inspector_layers(json.dumps({"Layers": [convolution, cast, brain, back, "not detailed"]}))
    assert [(row.operator, row.precision, row.weighted) for row in rows] == [
        ("CaskConvolution", Precision.INT8, True),
        ("Reformat", Precision.FP16, False),
        ("CaskConvolution", Precision.BF16, True),
        ("Reformat", Precision.BF16, False),
    ]


@pytest.mark.parametrize(("sizes", "shapes"), [((1, 8), (1, 1, 8)), ((32,), (1, 32, 32)), ((4, 2), (1, 4, 4))])
def test_an_engine_is_fastest_at_the_batch_that_recipes_are_chosen_by(sizes, shapes, captured):
    """And is made for the GPU of its profile, which is part of what it is."""
    profile = profile_for(NAME)
    execution = profile.execution.model_copy(update={"batch_sizes": sizes})
    device = profile.device.model_copy(update={"name": "cuda:1"})
    profile = profile.model_copy(update={"execution": execution, "device": device})
    options = get_backend(NAME).recipes(profile, captured["cnn"].graph)[0].options
    assert options["device"] == "cuda:1"
    told = []
    profiled = SimpleNamespace(set_shape=lambda name, *shapes: told.append(tuple(shape[0] for shape in shapes)))
    builder = SimpleNamespace(create_builder_config=_Config, create_optimization_profile=lambda: profiled)
    network = SimpleNamespace(num_inputs=1, get_input=lambda _: SimpleNamespace(name="images", shape=(-1, 3, 8, 8)))
    verbosity = SimpleNamespace(ProfilingVerbosity=SimpleNamespace(DETAILED=1), BuilderFlag=SimpleNamespace())
    tensorrt._config(verbosity, builder, network, options)
    assert told == [shapes]


class _Config(SimpleNamespace):
    def add_optimization_profile(self, profile):
        self.profile = profile


@pytest.mark.parametrize(("name", "ordinal"), [("GPU", 0), ("cuda:0", 0), ("cuda:1", 1), ("GPU.2", 2), ("CPU", 0)])
def test_device_names_give_an_ordinal(name: str, ordinal: int):
    assert _device.ordinal(name) == ordinal


class _FakeCuda:
    """The calls of the CUDA runtime that a session makes, on host memory."""

    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2)  # noqa: N815

    def __init__(self) -> None:
        self.memory: dict[int, np.ndarray] = {}

    def __getattr__(self, name: str) -> Callable[..., tuple[int]]:
        return lambda *_: (0,)

    def cudaStreamCreate(self) -> tuple[int, int]:  # noqa: N802
        return 0, 77

    def cudaMalloc(self, size: int) -> tuple[int, int]:  # noqa: N802
        block = np.zeros(size, np.uint8)
        self.memory[block.ctypes.data] = block
        return 0, block.ctypes.data

    def cudaMemcpyAsync(self, target: int, source: int, size: int, kind: int, stream: int) -> tuple[int]:  # noqa: N802
        ctypes.memmove(target, source, size)
        return (0,)

    def cudaFree(self, address: int) -> tuple[int]:  # noqa: N802
        del self.memory[address]
        return (0,)


class _FakeEngine:
    """An engine for up to 3 rows that doubles its input (B,4), and its own execution context."""

    num_io_tensors = 2

    def __init__(self) -> None:
        self.addresses: dict[str, int] = {}
        self.batches: list[int] = []

    def create_execution_context(self) -> _FakeEngine:
        return self

    def get_tensor_name(self, index: int) -> str:
        return ("images", "logits")[index]

    def get_tensor_mode(self, name: str) -> str:
        return "in" if name == "images" else "out"

    def get_tensor_dtype(self, name: str) -> type:
        return np.float32

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, int]]:
        return [(1, 4), (1, 4), (3, 4)]

    def get_tensor_shape(self, name: str) -> tuple[int, int]:
        return (self.batches[-1] if self.batches else -1, 4)

    def set_tensor_address(self, name: str, address: int) -> None:
        self.addresses[name] = address

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> None:
        self.batches.append(shape[0])

    def execute_async_v3(self, stream: int) -> bool:
        count = self.batches[-1] * 4
        source, target = (
            np.ctypeslib.as_array((ctypes.c_float * count).from_address(self.addresses[n])) for n in ("images", "logits")
        )
        target[:] = 2 * source
        return stream == 77


def test_session_slices_copies_and_frees(monkeypatch: pytest.MonkeyPatch):
    """The GPU path with everything but the GPU: pointers, sizes, slices beyond the largest batch, and no leak."""
    bindings = pytest.importorskip("cuda.bindings")
    cuda, engine = _FakeCuda(), _FakeEngine()
    monkeypatch.setattr(bindings, "runtime", cuda, raising=False)
    trt = ModuleType("fake_tensorrt")
    trt.ILogger, trt.nptype, trt.TensorIOMode = object, lambda dtype: dtype, SimpleNamespace(INPUT="in")
    trt.Runtime = lambda logger: SimpleNamespace(deserialize_cuda_engine=lambda data: engine)
    images = np.arange(28, dtype=np.float32).reshape(7, 4)
    with tensorrt.TensorRtSession(trt, b"engine", "cuda:1") as session:
        assert session.device == "cuda:1"
        np.testing.assert_array_equal(session.run({"images": images})["logits"], 2 * images)
    assert engine.batches == [3, 3, 1]
    assert not cuda.memory


@pytest.mark.parametrize("recipe_name", ["fp32", "fp16", INT8])
def test_a_remote_gpu_gets_the_typed_graph_and_builds_the_engine_itself(captured, recipe_name, tmp_path):
    """No TensorRT is needed here: the runner on the device has the build step."""
    jetson = find_profile("jetson-orin")
    there = jetson.model_copy(update={"device": jetson.device.model_copy(update={"host": "me@jetson"})})
    backend = get_backend("tensorrt")
    probe = backend.probe(there)
    assert (probe.can_build, probe.can_run) == (True, False)
    assert "me@jetson builds the engine" in probe.reason
    recipe = recipe_named(backend, there, captured["cnn"].graph, recipe_name)
    artifact = backend.build(captured["cnn"].graph, recipe, captured["cnn"].calibration, tmp_path)
    assert {value.name for value in onnx.load(artifact.path).graph.input} == {"images"}
    weighted = [layer.precision for layer in artifact.layers if layer.weighted]
    assert len(weighted) == 16
    assert set(weighted) == {recipe.precision}
    with pytest.raises(BackendError, match="built on its device"):
        backend.load(artifact, there)


def test_a_recurrent_network_has_a_layer_table():
    """TensorRT unrolls an LSTM into a loop, whose limit is a layer without an output."""
    trt = pytest.importorskip("tensorrt_rtx")
    rng, make = np.random.default_rng(0), onnx.helper.make_tensor_value_info
    shapes = {"W": (1, 16, 3), "R": (1, 16, 4)}
    weights = [onnx.numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name) for name, shape in shapes.items()]
    nodes = [
        onnx.helper.make_node("Transpose", ["tokens"], ["steps"], perm=[1, 0, 2]),
        onnx.helper.make_node("LSTM", ["steps", "W", "R"], ["states"], hidden_size=4),
    ]
    values = [make("tokens", onnx.TensorProto.FLOAT, ["batch", 5, 3]), make("states", onnx.TensorProto.FLOAT, [5, 1, "batch", 4])]
    graph = onnx.helper.make_graph(nodes, "lstm", values[:1], values[1:], weights)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=9)
    engine, layers = tensorrt._build_engine(trt, model, {"max_batch": 8})
    assert len(engine) > 1000
    assert any(layer.weighted and layer.precision == "fp32" for layer in layers)
