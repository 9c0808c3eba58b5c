"""The reference back end is the documentation of the seam: it takes floats on a CPU and changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from fofa_deploy.backend import get_backend
from fofa_deploy.errors import BuildError
from fofa_deploy.types import Precision

from .conftest import Built, Captured, profile_for


def test_artifact_is_a_copy_of_the_graph(build: Callable[[str, str, str], Built]):
    built = build("reference", "cnn", "fp32")
    assert built.artifact.sha256 == built.captured.graph.sha256


def test_int8_is_refused(captured: dict[str, Captured], tmp_path: Path):
    backend = get_backend("reference")
    recipe = backend.recipes(profile_for("reference"), captured["cnn"].graph)[0].model_copy(update={"precision": Precision.INT8})
    with pytest.raises(BuildError, match="int8"):
        backend.build(captured["cnn"].graph, recipe, captured["cnn"].calibration, tmp_path)
