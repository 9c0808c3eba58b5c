"""A runnable example beside every artifact: from a photograph to its class in ten lines, with nothing of fofa_deploy in it.

What an example shares with a service lies beside it as a file of its own: `preprocess`, and `engine` for TensorRT.
"""

from __future__ import annotations

from importlib.resources import files

from fofa_deploy.types import Artifact

NAME, PREPROCESS, ENGINE = "serve.py", "preprocess.py", "engine.py"
_TEXT = '''"""Classify photographs: python serve.py photo.jpg ..."""
import sys
from pathlib import Path
{imports}
from preprocess import prepare, read_sidecar

here = Path(__file__).resolve().parent
sidecar = read_sidecar(here)
{load}
for photo in sys.argv[1:]:
    scores = {run}[0]
    print(photo, sidecar["class_names"][scores.argmax()], float(scores.max()))
'''
_SPELLED = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}


def _onnxruntime(artifact: Artifact) -> dict[str, str]:
    options, main = artifact.recipe.options, artifact.files[0].path
    provider = f'providers=["{options.get("provider")}"]'
    plain = f'session = ort.InferenceSession(here / "{main}", {provider})'
    exact = (
        "options = ort.SessionOptions()\n"
        'options.add_session_config_entry("session.x64quantprecision", "1")  # exact int8 products without VNNI\n'
        f'session = ort.InferenceSession(here / "{main}", options, {provider})'
    )
    # Where CUDA does not start, onnxruntime goes on with the CPU.
    cuda = (
        "ort.preload_dlls()  # CUDA and cuDNN, from where pip puts them\n"
        f'session = ort.InferenceSession(here / "{main}", {provider}, enable_fallback=0)\n'
        'if session.get_providers()[0] != "CUDAExecutionProvider":\n'
        '    sys.exit("CUDA does not start: see nvidia-smi")'
    )
    on_gpu = options.get("provider") == "CUDAExecutionProvider"
    return {
        "imports": "import onnxruntime as ort",
        "load": cuda if on_gpu else exact if options.get("exact_kernels") else plain,
        "run": 'session.run(None, {sidecar["input"]["name"]: prepare(photo, sidecar)})[0]',
    }


def _openvino(artifact: Artifact) -> dict[str, str]:
    options = artifact.recipe.options
    hint = f'{{"INFERENCE_PRECISION_HINT": "{_SPELLED[str(options["inference_precision"])]}"}}'
    return {
        "imports": "import openvino as ov",
        "load": f'model = ov.Core().compile_model(here / "{artifact.files[0].path}", "{options["device"]}", {hint})',
        "run": "model(prepare(photo, sidecar))[0]",
    }


def _tensorrt(artifact: Artifact) -> dict[str, str]:
    package = artifact.backend.replace("-", "_")
    return {
        "imports": f"import {package} as trt\nfrom engine import Engine",
        "load": 'engine = Engine(trt, here / "model.engine", sidecar)',
        "run": "engine(prepare(photo, sidecar))",
    }


_EXAMPLES = {"onnxruntime": _onnxruntime, "openvino": _openvino, "tensorrt": _tensorrt, "tensorrt-rtx": _tensorrt}


def example(artifact: Artifact) -> str | None:
    """The text of ``serve.py``; None for a runtime without one."""
    parts = _EXAMPLES.get(artifact.backend)
    return _TEXT.format(**parts(artifact)) if parts else None


def write_example(artifact: Artifact) -> None:
    """Beside the artifact's files, which its digest covers without it."""
    text = example(artifact)
    if text is None:
        return
    (artifact.folder / NAME).write_text(text)
    for name in [PREPROCESS, ENGINE] if "from engine" in text else [PREPROCESS]:
        (artifact.folder / name).write_text(files(__name__).joinpath(name).read_text())
