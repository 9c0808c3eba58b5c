"""serve.py, run as a user runs it, says of a photograph what this package says of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from tiny import build, write_graph

from fofa_deploy.backend import get_backend
from fofa_deploy.config import DataPlan
from fofa_deploy.data.sources import to_pixels
from fofa_deploy.profile import find_profile
from fofa_deploy.serving import NAME, example, write_example
from fofa_deploy.types import Artifact

SHOW = "import serve, sys, json; print(json.dumps(serve.logits(sys.argv.pop()).tolist()))"


@pytest.mark.parametrize("profile_name", ["cpu-onnxruntime", "cpu-openvino"])
def test_a_photograph_gets_the_same_logits(profile_name, tmp_path):
    graph, profile = write_graph(tmp_path / "graph"), find_profile(profile_name)
    artifact = Artifact.load(build(graph, profile_name, tmp_path / "artifact"))
    write_example(artifact)
    photo = tmp_path / "a photo.png"
    Image.linear_gradient("L").rotate(30).resize((37, 29)).save(photo)
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    options = {"cwd": artifact.folder, "env": clean, "capture_output": True, "text": True, "check": True, "timeout": 120}
    shown = subprocess.run([sys.executable, NAME, photo], **options)
    told = subprocess.run([sys.executable, "-c", SHOW.replace("sys.argv.pop()", repr(str(photo)))], **options)
    known = artifact.sidecar.preprocessing
    plan = DataPlan(name="images", classes=3, **known.model_dump())
    pixels = known.apply(to_pixels(Image.open(photo), plan)[None])
    with get_backend(artifact.backend).load(artifact, profile) as session:
        expected = session.run({artifact.sidecar.input.name: pixels})[artifact.sidecar.output.name][0]
    np.testing.assert_allclose(json.loads(told.stdout), expected, rtol=1e-4, atol=1e-4)
    assert shown.stdout.split()[-2] == artifact.sidecar.class_names[int(expected.argmax())]
    assert Artifact.load(artifact.folder).sha256 == artifact.sha256


def test_a_runtime_without_an_example_gets_none(tmp_path):
    artifact = Artifact.load(build(write_graph(tmp_path / "graph"), "reference", tmp_path / "artifact"))
    assert example(artifact) is None
    write_example(artifact)
    assert not (artifact.folder / NAME).exists()
