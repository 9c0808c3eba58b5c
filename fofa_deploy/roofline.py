"""What a layer could take at best here: its multiplications and bytes from the graph, this machine's limits by measurement.

After Williams, Waterman and Patterson, "Roofline" (2009): nothing is faster than its arithmetic at the measured peak or its
bytes at the measured bandwidth, whichever takes longer. Bytes count every operand once, as if caches held nothing between layers.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import onnx
from pydantic import PositiveFloat, ValidationError

from fofa_deploy import environment
from fofa_deploy.results import Environment, LayerCost, Peaks
from fofa_deploy.runner.runtimes import openvino
from fofa_deploy.store import write_atomic
from fofa_deploy.types import Frozen, LayerTime, Precision

WIDTH = {Precision.FP32: 4, Precision.FP16: 2, Precision.BF16: 2, Precision.INT8: 1}
SIDE = 1024
"""Of the matrices by which peaks are measured: large enough to leave the overheads behind, small enough to be quick."""
COPY_BYTES = 128 << 20
REPEATS = 5
PRODUCTS = ("Conv", "Gemm", "MatMul")
FUSED = ("Add", "BatchNormalization", "Clip", "HardSigmoid", "HardSwish", "LeakyRelu", "Mul", "Relu", "Sigmoid", "Tanh")
COVERED = 0.9
"""Share of all multiplications that must be found among the layers before the whole artifact is compared with a limit."""


class Work(Frozen):
    """Of one graph node for one image."""

    macs: int
    elements: int
    carriers: tuple[str, ...] = ()
    """Tensors that hold its result, through what runtimes fuse with it; some name the fused kernel after the last of them."""


# --- the graph ----------------------------------------------------------------------------------------------------


def work(path: Path, batch: int = 1) -> dict[str, Work]:
    """Multiply-accumulates and elements moved, per convolution and matrix product of a graph, by node name.

    A node without a name goes by its output's.
    """
    model = onnx.load(path)
    weights = {tensor.name for tensor in model.graph.initializer}  # which old files list among the inputs, too
    for value in (*model.graph.input, *model.graph.output):
        if value.name not in weights and value.type.tensor_type.shape.dim:
            value.type.tensor_type.shape.dim[0].dim_value = batch
    shapes = _shapes(onnx.shape_inference.infer_shapes(model, data_prop=True).graph)
    found = {_name(node): _work(node, shapes) for node in model.graph.node if node.output}
    carriers = _carriers(model.graph)
    return {name: cost.model_copy(update={"carriers": carriers[name]}) for name, cost in found.items() if cost}


def _name(node: onnx.NodeProto) -> str:
    return node.name or node.output[0]


def _carriers(graph: onnx.GraphProto) -> dict[str, tuple[str, ...]]:
    """Per product, its output and those of the element-wise operators behind it."""
    origin: dict[str, str] = {}
    for node in graph.node:
        sources = [origin[name] for name in node.input if name in origin]
        if node.op_type in PRODUCTS:
            origin[node.output[0]] = _name(node)
        elif node.op_type in FUSED and sources:
            origin[node.output[0]] = sources[-1]
    return {name: tuple(tensor for tensor, source in origin.items() if source == name) for name in set(origin.values())}


def _shapes(graph: onnx.GraphProto) -> dict[str, tuple[int, ...]]:
    """Of every tensor whose shape is known."""
    values = [*graph.input, *graph.value_info, *graph.output]
    dims = {value.name: value.type.tensor_type.shape.dim for value in values}
    known = {name: tuple(d.dim_value for d in shape) for name, shape in dims.items() if all(d.dim_value > 0 for d in shape)}
    return known | {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}


def _work(node: onnx.NodeProto, shapes: Mapping[str, tuple[int, ...]]) -> Work | None:
    names = [*node.input[:2], node.output[0]]
    if node.op_type not in PRODUCTS or any(name not in shapes for name in names):
        return None
    left, right, out = (shapes[name] for name in names)
    if node.op_type == "Conv":
        depth = math.prod(right[1:])
    elif node.op_type == "MatMul":
        depth = left[-1]
    else:
        depth = left[0] if any(a.name == "transA" and a.i for a in node.attribute) else left[1]
    return Work(macs=math.prod(out) * depth, elements=math.prod(left) + math.prod(right) + math.prod(out))


# --- this machine -------------------------------------------------------------------------------------------------


def peaks(threads: int) -> Peaks:
    """This machine's limits with so many threads: measured in a quiet moment, and kept in the user's cache while it is the same."""
    here = environment.describe()
    path = cache() / f"peaks-{here.fingerprint[:16]}-{threads}.json"
    known = _read(path)
    if known and not known.busy:
        return known
    found = _higher(known, _measured(threads, here))
    with suppress(OSError):  # a read-only home costs the measurement each time
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, found.model_dump_json(indent=1).encode())
    return found


def _read(path: Path) -> Peaks | None:
    try:
        return Peaks.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None


def _higher(known: Peaks | None, found: Peaks) -> Peaks:
    """A limit that was reached once is one, whatever disturbed the other measurement."""
    if known is None:
        return found
    gops = {name: max(value, known.gops.get(name, value)) for name, value in found.gops.items()}
    return found.model_copy(update={"gops": gops, "gbps": max(known.gbps, found.gbps)})


def cache() -> Path:
    """The user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fofa-deploy"


def _measured(threads: int, here: Environment) -> Peaks:
    products = {Precision.FP32: _onnxruntime_product(threads, False), Precision.INT8: _onnxruntime_product(threads, True)}
    products |= _openvino_product(threads)
    return Peaks(
        gops={str(precision): 2 * SIDE**3 / _fastest(run) / 1e9 for precision, run in products.items()},
        gbps=_bandwidth(threads),
        threads=threads,
        measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
        fingerprint=here.fingerprint,
        busy=here.load_average is None or here.load_average > here.cores + 0.5,  # half a core over what we did ourselves
    )


def _fastest(run: Callable[[], object]) -> float:
    """Seconds of the fastest of a few runs: a limit is what the machine can do, not what it does on average."""
    run()
    took = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        run()
        took.append(time.perf_counter() - started)
    return min(took)


def _product(integer: bool) -> onnx.ModelProto:
    """out = a @ weights, square; in integers u8 x s7 -> s32, which no CPU saturates."""
    make, kind = onnx.helper, onnx.TensorProto.UINT8 if integer else onnx.TensorProto.FLOAT
    rng = np.random.default_rng(0)
    weights = rng.integers(-64, 64, (SIDE, SIDE), np.int8) if integer else rng.standard_normal((SIDE, SIDE), np.float32)
    node = make.make_node("MatMulInteger" if integer else "MatMul", ["a", "weights"], ["out"])
    sink = onnx.TensorProto.INT32 if integer else onnx.TensorProto.FLOAT
    values = [make.make_tensor_value_info(name, dtype, [SIDE, SIDE]) for name, dtype in (("a", kind), ("out", sink))]
    graph = make.make_graph([node], "product", values[:1], values[1:], [onnx.numpy_helper.from_array(weights, "weights")])
    return make.make_model(graph, opset_imports=[make.make_opsetid("", 18)], ir_version=9)


def _onnxruntime_product(threads: int, integer: bool) -> Callable[[], object]:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(_product(integer).SerializeToString(), options, providers=["CPUExecutionProvider"])
    feeds = {"a": np.ones((SIDE, SIDE), np.uint8 if integer else np.float32)}
    return lambda: session.run(None, feeds)


def _openvino_product(threads: int) -> dict[Precision, Callable[[], object]]:
    """bf16, where the CPU has it: ONNX Runtime's own matrix product has none."""
    ov = openvino()
    core = ov.Core()
    if "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        return {}
    config = {"INFERENCE_PRECISION_HINT": ov.Type.bf16, "INFERENCE_NUM_THREADS": threads}
    request = core.compile_model(core.read_model(_product(False).SerializeToString()), "CPU", config).create_infer_request()
    feeds = {"a": np.ones((SIDE, SIDE), np.float32)}
    return {Precision.BF16: lambda: request.infer(feeds)}


def _bandwidth(threads: int) -> PositiveFloat:
    """GB/s of copying, bytes read and bytes written both counted."""
    pairs = [(np.ones(COPY_BYTES // threads, np.uint8), np.empty(COPY_BYTES // threads, np.uint8)) for _ in range(threads)]
    with ThreadPoolExecutor(threads) as pool:
        seconds = _fastest(lambda: list(pool.map(lambda pair: np.copyto(pair[1], pair[0]), pairs)))
    return 2 * COPY_BYTES / seconds / 1e9


# --- both ---------------------------------------------------------------------------------------------------------


def costs(times: tuple[LayerTime, ...], nodes: Mapping[str, Work], limits: Peaks | None) -> tuple[LayerCost, ...]:
    """Each layer with its graph node's work and the least it could take, as far as both are known."""
    total = sum(layer.ms for layer in times)
    return tuple(_cost(layer, _node_of(layer, nodes), nodes, limits, total) for layer in times)


def least_ms(layers: Sequence[LayerCost], nodes: Mapping[str, Work]) -> float | None:
    """Least time of all products together; None where too few of them were found among the layers."""
    covered = sum(layer.macs for layer in layers if layer.macs)
    if not layers or covered < COVERED * sum(node.macs for node in nodes.values()):
        return None
    return sum(layer.ms * layer.of_limit for layer in layers if layer.of_limit is not None)


def _node_of(layer: LayerTime, nodes: Mapping[str, Work]) -> str | None:
    """The graph node that a runtime's product came from: runtimes append to its name, or take that of what carries its result."""
    if not any(word in layer.operator for word in (*PRODUCTS, "FullyConnected")):
        return None
    fitting = [name for name in nodes if layer.name == name or layer.name.startswith((f"{name}/", f"{name}_token_"))]
    carried = [name for name, node in nodes.items() if layer.name.removesuffix("_nchwc") in node.carriers]
    return max(fitting or carried, key=len, default=None)


def _cost(layer: LayerTime, node: str | None, nodes: Mapping[str, Work], limits: Peaks | None, total: float) -> LayerCost:
    share = layer.ms / total if total else 0.0
    known = LayerCost(**layer.model_dump(), share=share)
    if node is None or limits is None or layer.precision not in limits.gops or not layer.ms:
        return known
    peak = limits.gops[layer.precision]
    size = nodes[node].elements * WIDTH[Precision(layer.precision)]
    least = 1e3 * max(2 * nodes[node].macs / (peak * 1e9), size / (limits.gbps * 1e9))
    return known.model_copy(update={"macs": nodes[node].macs, "bytes": size, "of_limit": least / layer.ms})
