"""Who takes part: every peer at its defaults and at the best its documentation tells, and how its model becomes an artifact."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import environments

from fofa_deploy.store import digest, write_atomic
from fofa_deploy.types import Artifact, Graph, Precision, Recipe, Scalar

HERE = Path(__file__).parent
BUILD_SECONDS = 1800
BACKENDS = {"onnxruntime": "onnxruntime", "openvino": "peers-openvino", "torch": "peers-torch"}


@dataclass(frozen=True)
class Peer:
    """One way in which another tool makes something of a model.

    ``default``: as the tool's documentation's first example does it; ``reference``: not a tool's work but the model itself.
    """

    name: str
    runtime: str
    function: str
    description: str
    precision: Precision = Precision.INT8
    environment: str | None = None
    default: bool = False
    reference: bool = False
    transformers_only: bool = False
    compiled: str = ""
    """How `backends.TorchSession` gets at it."""


def _ort(name: str, function: str, description: str, **more: object) -> Peer:
    return Peer(f"ort-{name}", "onnxruntime", f"make_onnxruntime:{function}", description, **more)  # type: ignore[arg-type]


def _ov(name: str, function: str, description: str, **more: object) -> Peer:
    return Peer(name, "openvino", f"make_openvino:{function}", description, **more)  # type: ignore[arg-type]


def _torch(name: str, function: str, compiled: str, description: str, **more: object) -> Peer:
    return Peer(name, "torch", f"make_torch:{function}", description, compiled=compiled, **more)  # type: ignore[arg-type]


FLOAT, FUSED = {"precision": Precision.FP32}, {"transformers_only": True}
AO = {"environment": "torchao"}
OPTIMUM, OLIVE = {"environment": "optimum-onnx", "default": True}, {"environment": "olive", "default": True}
PEERS = (
    _ort("fp32", "as_is", "the graph as it is", reference=True, **FLOAT),
    _ort("static-default", "static_default", "quantize_static as it comes", default=True),
    _ort("static-best", "static_best", "pre-processed, Q/DQ, u8 activations, s8 weights per channel, reduce_range without VNNI"),
    _ort("static-percentile", "static_percentile", "the same, ranges by percentile"),
    _ort("static-entropy", "static_entropy", "the same, ranges by entropy"),
    _ort("static-u8u8", "static_u8u8", "the same, unsigned weights in eight bits"),
    _ort("dynamic-default", "dynamic_default", "quantize_dynamic as it comes", default=True),
    _ort("dynamic-matmul", "dynamic_matmul", "pre-processed, quantize_dynamic of MatMul alone, per channel"),
    _ort("transformers-fp32", "transformers_fp32", "onnxruntime.transformers' optimizer", **FLOAT, **FUSED),
    _ort("transformers-dynamic", "transformers_dynamic", "the same, then quantize_dynamic of MatMul and Attention", **FUSED),
    Peer("olive-dynamic", "onnxruntime", "make_olive:dynamic", "Olive, OnnxDynamicQuantization", **OLIVE),  # type: ignore[arg-type]
    Peer("olive-static", "onnxruntime", "make_olive:static", "Olive, OnnxStaticQuantization", **OLIVE),  # type: ignore[arg-type]
    Peer("optimum-dynamic", "onnxruntime", "make_optimum:onnxruntime_dynamic", "Optimum, avx2, dynamic", **OPTIMUM),  # type: ignore[arg-type]
    Peer("optimum-static", "onnxruntime", "make_optimum:onnxruntime_static", "Optimum, avx2, static", **OPTIMUM),  # type: ignore[arg-type]
    _ov("openvino-fp32", "convert", "OpenVINO as it comes: converted, saved, compiled", default=True, **FLOAT),
    _ov("nncf-default", "nncf_default", "nncf.quantize as it comes", default=True),
    _ov("nncf-transformer", "nncf_transformer", "nncf.quantize, ModelType.TRANSFORMER", **FUSED),
    _ov("nncf-mixed", "nncf_mixed", "nncf.quantize, preset MIXED, slow bias correction"),
    _ov("nncf-accuracy-control", "nncf_accuracy_control", "nncf.quantize_with_accuracy_control, max_drop 0.01"),
    Peer(
        "optimum-intel",
        "openvino",
        "make_optimum:openvino_static",
        "Optimum Intel, OVQuantizer",
        environment="optimum-intel",
        default=True,
    ),
    _torch("torch-eager", "weights", "eager", "PyTorch as it is", reference=True, **FLOAT),
    _torch("torch-compile", "weights", "compile", "torch.compile as it comes", default=True, **FLOAT),
    _torch("torch-compile-frozen", "weights", "frozen", "torch.compile with freezing", **FLOAT),
    _torch("torchao-dynamic", "weights", "int8", "torchao quantize_, dynamic int8 of Linear, compiled", default=True, **AO),
    _torch(
        "torchao-pt2e-static",
        "pt2e_static",
        "program",
        "torchao pt2e, X86InductorQuantizer, compiled with freezing",
        default=True,
        **AO,
    ),
    _torch("torchao-pt2e-dynamic", "pt2e_dynamic", "program", "the same, dynamic", **AO),
)


def peers_for(runtimes: set[str], transformer: bool) -> list[Peer]:
    return [peer for peer in PEERS if peer.runtime in runtimes and (transformer or not peer.transformers_only)]


class NotBuiltError(Exception):
    """A peer failed; the message is its own last line."""


def build(peer: Peer, job: Path, out: Path, work: Path) -> tuple[Artifact, dict]:
    """A peer's artifact, and what building it took; built once per model and version of its recipe.

    Raises:
        NotBuiltError: it does not install, or it failed.
        subprocess.TimeoutExpired: it took longer than `BUILD_SECONDS`.
    """
    told = json.loads(job.read_bytes())
    module = HERE / f"{peer.function.partition(':')[0]}.py"
    key = digest([module, told["sha256"], peer.function, Path(told["calibration"])])
    record = out / "record.json"
    if record.is_file() and json.loads(record.read_bytes())["key"] == key:
        return Artifact.load(out), json.loads(record.read_bytes())
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    took = _run(peer, job, out, work)
    artifact = _wrapped(peer, told, out, out / took["file"], took["versions"], work)
    write_atomic(record, json.dumps({**took, "key": key}).encode())
    return artifact, took


def _run(peer: Peer, job: Path, out: Path, work: Path) -> dict:
    try:
        interpreter = environments.python(peer.environment, work) if peer.environment else Path(sys.executable)
    except environments.NotInstalledError as error:
        raise NotBuiltError(f"does not install: {error}") from error
    command = [interpreter, HERE / "make.py", peer.function, job, out]
    log = out.with_suffix(".log")
    with log.open("w") as stream:
        done = subprocess.run(
            command,
            stdout=stream,
            stderr=subprocess.STDOUT,
            cwd=out,
            env=environments.environment(),
            timeout=BUILD_SECONDS,
            check=False,
        )
    if done.returncode:
        raise NotBuiltError(environments.last_line(log.read_text(errors="replace")))
    return json.loads((out / "build.json").read_bytes())


def _wrapped(peer: Peer, job: dict, out: Path, main: Path, versions: dict[str, str], work: Path) -> Artifact:
    """A peer's file as an artifact. Nothing is claimed of its layers: what counts here is how fast and how close it is."""
    options: dict[str, Scalar] = {"provider": "CPUExecutionProvider"} if peer.runtime == "onnxruntime" else {}
    if peer.compiled:
        packages = str(environments.site(peer.environment, work).absolute()) if peer.environment else ""
        told = {"model": job["model"], "arguments": json.dumps(job["arguments"])}
        options = {"compiled": peer.compiled, "packages": packages, **told}
    recipe = Recipe(name=peer.name, precision=peer.precision, description=peer.description, options=options)
    graph = Graph.load(Path(job["graph"]).parent)
    backend = BACKENDS[peer.runtime]
    return Artifact.of(out, main, backend=backend, recipe=recipe, graph=graph, layers=(), versions=versions)
