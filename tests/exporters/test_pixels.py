"""Every back end and kind of recipe on graphs that take uint8 pixels: the inputs differ from the contract suite's, nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx
import pytest

from fofa_deploy.backend import FileOpener, LayerProfiler, backend_names, get_backend
from fofa_deploy.judge import precision_problem
from fofa_deploy.pixels import take_pixels
from fofa_deploy.roofline import costs, work
from fofa_deploy.types import Artifact, Graph, Precision, Recipe

from .conftest import BATCHES, KINDS, SIZE, Built, Captured, images, profile_for, stand_in
from .test_contract import AGREEMENT, COSINE, PEAKS, _cosine

PIXELS = np.ascontiguousarray(images(24, 4).transpose(0, 2, 3, 1))
"""What `Captured.inputs` is made of, (24,32,32,3)."""


def _cases() -> Iterator[tuple[str, str, str]]:
    """(back end, kind, recipe name): one of every family that quantizes all it can, and one with learned rounding."""
    for kind in KINDS:
        with TemporaryDirectory() as folder:
            graph = stand_in(kind, Path(folder))
            for name in backend_names():
                yield from (
                    (name, kind, recipe.name) for recipe in get_backend(name).recipes(profile_for(name), graph) if _counts(recipe)
                )


def _counts(recipe: Recipe) -> bool:
    gives_layers_back = recipe.options.get("float_share") or recipe.options.get("max_drop")
    return not gives_layers_back and (recipe.name == recipe.kin or bool(recipe.options.get("learned_rounding")))


@pytest.fixture(scope="module")
def taken(captured: dict[str, Captured], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Captured]:
    return {kind: _taken(captured[kind], tmp_path_factory.mktemp(kind)) for kind in KINDS}


def _taken(captured: Captured, folder: Path) -> Captured:
    model, sidecar = take_pixels(onnx.load(captured.graph.path), captured.graph.sidecar)
    onnx.save(model, folder / "model.onnx")
    (folder / "sidecar.json").write_text(sidecar.model_dump_json())
    calibration = captured.calibration.model_copy(update={"sidecar": sidecar})
    return Captured(Graph.load(folder), calibration, PIXELS, captured.logits)


@pytest.fixture(scope="module", params=_cases(), ids="-".join)
def built(request: pytest.FixtureRequest, taken: dict[str, Captured], tmp_path_factory: pytest.TempPathFactory) -> Built:
    name, kind, recipe_name = request.param
    backend, profile, graph = get_backend(name), profile_for(name), taken[kind]
    probe = backend.probe(profile)
    if not probe.can_build:
        pytest.skip(f"{name} cannot build here: {probe.reason}")
    recipe = next(recipe for recipe in backend.recipes(profile, graph.graph) if recipe.name == recipe_name)
    artifact = backend.build(graph.graph, recipe, graph.calibration, tmp_path_factory.mktemp("built"))
    return Built(backend, profile, graph, Artifact.load(artifact.folder))


def test_keeps_its_precision(built: Built):
    assert not precision_problem(built.artifact)
    if built.artifact.recipe.precision is Precision.INT8 and built.captured.graph.sidecar.model == "cnn":
        assert {layer.precision for layer in built.artifact.layers if layer.weighted} == {Precision.INT8}, "the first one included"
    assert (built.artifact.sidecar.input.dtype, built.artifact.sidecar.layout) == ("uint8", "NHWC")


def test_agrees_with_pytorch_in_every_batch_size(built: Built):
    _need_to_run(built)
    precision, expected = built.artifact.recipe.precision, built.captured.logits
    with built.backend.load(built.artifact, built.profile) as session:
        for size in BATCHES:
            batches = [session.run({"pixels": PIXELS[start : start + size]})["logits"] for start in range(0, 24, size)]
            found = np.concatenate(batches)
            assert _cosine(found, expected) >= COSINE[precision]
            assert np.mean(found.argmax(1) == expected.argmax(1)) >= AGREEMENT[precision]


def test_its_layers_are_timed_and_found_in_the_graph(built: Built):
    _need_to_run(built)
    if not isinstance(built.backend, LayerProfiler):
        pytest.skip(f"{built.backend.name} has no profiler")
    times = built.backend.layer_times(built.artifact, built.profile, {"pixels": PIXELS[:1]}, 2)
    assert {layer.macs for layer in costs(times, work(built.captured.graph.path), PEAKS)} - {None}


def test_its_file_says_that_it_takes_pixels(built: Built):
    _need_to_run(built)
    if not isinstance(built.backend, FileOpener):
        pytest.skip(f"{built.backend.name} opens only what it has built")
    (spec,) = built.backend.describe_file(built.artifact.path, built.profile).inputs
    assert (spec.name, spec.shape[1:], spec.dtype) == ("pixels", (SIZE, SIZE, 3), "uint8")


def _need_to_run(built: Built) -> None:
    probe = built.backend.probe(built.profile)
    if not probe.can_run:
        pytest.skip(f"{built.backend.name} cannot run here: {probe.reason}")
