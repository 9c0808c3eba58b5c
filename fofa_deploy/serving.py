"""A runnable example beside every artifact: from a photograph to classes, with nothing of fofa_deploy in it."""

from __future__ import annotations

from fofa_deploy.types import Artifact

NAME = "serve.py"
_HEAD = '''"""Classify photographs: python serve.py photo.jpg ..."""
import json, sys
from pathlib import Path
import numpy as np
{imports}
from PIL import Image, ImageOps

here = Path(__file__).resolve().parent
sidecar = json.loads((here / "sidecar.json").read_text())
p = sidecar["preprocessing"]
{load}


def logits(file):
    """What the network says of one photograph, prepared exactly as for training: float32 (classes,)."""
    image, (height, width) = Image.open(file).convert("L" if p["channels"] == 1 else "RGB"), p["image_size"]
    image = ImageOps.fit(image, (width, height), Image.Resampling[p["interpolation"].upper()], (1 - p["crop_fraction"]) / 2)
    pixels = np.asarray(image, np.float32).reshape(height, width, -1) / 255
    x = ((pixels - p["mean"]) / p["std"]).transpose(2, 0, 1)[None].astype(np.float32)
    return {run}[0]


for file in sys.argv[1:]:
    scores = logits(file)
    print(file, sidecar["class_names"][scores.argmax()], float(scores.max()))
'''
_ONNXRUNTIME = {
    "imports": "import onnxruntime as ort",
    "load": 'session = ort.InferenceSession(str(here / "{main}"), providers=["{provider}"])',
    "run": 'session.run(None, {sidecar["input"]["name"]: x})[0]',
}
_OPENVINO = {
    "imports": "import openvino as ov",
    "load": 'model = ov.Core().compile_model(here / "{main}", "{device}", {{"INFERENCE_PRECISION_HINT": "{precision}"}})',
    "run": 'model({sidecar["input"]["name"]: x})[sidecar["output"]["name"]]',
}
_EXAMPLES = {"onnxruntime": _ONNXRUNTIME, "openvino": _OPENVINO}
_SPELLED = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}


def example(artifact: Artifact) -> str | None:
    """The text of ``serve.py``; None for a runtime without one."""
    parts = _EXAMPLES.get(artifact.backend)
    if parts is None:
        return None
    options = artifact.recipe.options
    load = parts["load"].format(
        main=artifact.files[0].path,
        provider=options.get("provider"),
        device=options.get("device"),
        precision=_SPELLED.get(str(options.get("inference_precision"))),
    )
    return _HEAD.replace("{imports}", parts["imports"]).replace("{load}", load).replace("{run}", parts["run"])


def write_example(artifact: Artifact) -> None:
    """Beside the artifact's files, which its digest covers without it."""
    text = example(artifact)
    if text is not None:
        (artifact.folder / NAME).write_text(text)
