"""One suite for every registered back end and every recipe it offers. A new back end is tested here without a new line."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from numpy.typing import NDArray

from fofa_deploy.backend import Backend, FileOpener, LayerProfiler, Session, backend_names, get_backend
from fofa_deploy.errors import BackendError, BuildError, IntegrityError
from fofa_deploy.results import Peaks
from fofa_deploy.roofline import costs, work
from fofa_deploy.types import Artifact, Precision, Recipe

from .conftest import BATCHES, KINDS, Built, Captured, profile_for, run_in_batches, stand_in

TARGETS = (*backend_names(), "cuda-onnxruntime")
"""Back ends, each on the first of its devices that is here, and the device whose recipes are others."""

COSINE = {Precision.FP32: 0.999999, Precision.FP16: 0.9999, Precision.BF16: 0.999, Precision.INT8: 0.98}
PEAKS = Peaks(gops={"fp32": 100, "int8": 400, "bf16": 200, "fp16": 200}, gbps=10, threads=1, measured_at="", fingerprint="")
AGREEMENT = {Precision.FP32: 1.0, Precision.FP16: 0.98, Precision.BF16: 0.95, Precision.INT8: 0.85}


def _cases() -> list[tuple[str, str, str]]:
    """Every (target, kind, recipe name), asked for with stand-in graphs, because capturing is too slow for collecting."""
    with TemporaryDirectory() as folder:
        graphs = {kind: stand_in(kind, Path(folder) / kind) for kind in KINDS if (Path(folder) / kind).mkdir() is None}
        return [
            (name, kind, recipe.name)
            for name, profile in zip(TARGETS, map(profile_for, TARGETS), strict=True)
            for kind, graph in graphs.items()
            for recipe in _apart(get_backend(profile.runtime).recipes(profile, graph))
        ]


def _apart(recipes: Sequence[Recipe]) -> list[Recipe]:
    """One of every family, and one more with other numbers; the families of mixed precision differ in a share alone.

    How much of a model accuracy control leaves in int8 is its own choice.
    """
    families = {recipe.kin: recipe for recipe in reversed(recipes) if not recipe.options.get("max_drop")}
    shares = sorted({recipe.options.get("float_share", 0.0) for recipe in recipes})
    recovered = [recipe for recipe in recipes if recipe.options.get("learned_rounding")][:1]
    return [*(r for r in families.values() if r.options.get("float_share", 0.0) in shares[:2]), *recovered]


@pytest.fixture(params=_cases(), ids="-".join, scope="session")
def built(request: pytest.FixtureRequest, build: Callable[[str, str, str], Built]) -> Built:
    return build(*request.param)


@pytest.fixture
def session(built: Built) -> Session:
    probe = built.backend.probe(built.profile)
    if not probe.can_run:
        pytest.skip(f"{built.backend.name} cannot run here: {probe.reason}")
    return built.backend.load(built.artifact, built.profile)


@pytest.mark.parametrize("name", backend_names())
def test_fits_the_seam(name: str, captured: dict[str, Captured]):
    backend, profile = get_backend(name), profile_for(name)
    assert isinstance(backend, Backend)
    for kind in KINDS:
        recipes = backend.recipes(profile, captured[kind].graph)
        assert recipes, "no recipe for the profile it ships with"
        assert len({recipe.name for recipe in recipes}) == len(recipes)
        assert {recipe.precision for recipe in recipes} <= backend.precisions & set(profile.precisions)


@pytest.mark.parametrize("name", backend_names())
def test_offers_only_what_the_profile_allows(name: str, captured: dict[str, Captured]):
    profile = profile_for(name).model_copy(update={"precisions": (Precision.FP32,)})
    recipes = get_backend(name).recipes(profile, captured["cnn"].graph)
    assert [recipe.precision for recipe in recipes] == [Precision.FP32]


@pytest.mark.parametrize("name", backend_names())
def test_a_probe_that_says_no_says_why(name: str):
    probe = get_backend(name).probe(profile_for(name))
    assert (probe.can_build and probe.can_run) or probe.reason


@pytest.mark.parametrize("name", backend_names())
def test_refuses_a_device_it_cannot_drive(name: str):
    profile = profile_for(name)
    npu = profile.model_copy(update={"device": profile.device.model_copy(update={"kind": "npu", "name": "NPU.99"})})
    probe = get_backend(name).probe(npu)
    assert not probe.can_run
    assert probe.reason


def test_records_what_it_built(built: Built):
    artifact = built.artifact
    assert artifact.backend == built.backend.name
    assert artifact.graph_sha256 == built.captured.graph.sha256
    assert artifact.versions
    assert all((artifact.folder / record.path).is_file() for record in artifact.files)


def test_layer_table_proves_the_precision(built: Built):
    weighted = [layer for layer in built.artifact.layers if layer.weighted]
    kept = sum(layer.precision == built.artifact.recipe.precision for layer in weighted)
    assert weighted
    assert 2 * kept > len(weighted), [(layer.operator, layer.precision) for layer in weighted]


def test_round_trip(built: Built):
    assert Artifact.load(built.artifact.folder) == built.artifact


def test_altered_byte_is_refused(built: Built, tmp_path: Path):
    folder = Path(shutil.copytree(built.artifact.folder, tmp_path / "copy"))
    path = folder / built.artifact.files[0].path
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(IntegrityError):
        Artifact.load(folder)


@pytest.mark.parametrize("batch", BATCHES)
def test_agrees_with_pytorch(built: Built, session: Session, batch: int):
    precision = built.artifact.recipe.precision
    expected = built.captured.logits
    with session:
        found = run_in_batches(session, built.captured.inputs, batch)
    assert found.shape == expected.shape
    assert found.dtype == np.float32
    assert _cosine(found, expected) >= COSINE[precision]
    assert np.mean(found.argmax(1) == expected.argmax(1)) >= AGREEMENT[precision]
    if precision is Precision.FP32:
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)


def test_batch_order_does_not_matter(built: Built, session: Session):
    inputs = built.captured.inputs[:8]
    order = np.array([5, 2, 7, 0, 3, 6, 1, 4])
    with session:
        straight, shuffled = run_in_batches(session, inputs, 8), run_in_batches(session, inputs[order], 8)
    # Dynamic int8 takes its activation range from the whole batch, which is the same set of images here.
    np.testing.assert_allclose(shuffled, straight[order], rtol=1e-4, atol=1e-4)


def test_is_deterministic(built: Built, session: Session):
    feeds = {"images": built.captured.inputs[:2]}
    with session:
        first = session.run(feeds)["logits"].copy()
        np.testing.assert_array_equal(session.run(feeds)["logits"], first)


def test_outputs_survive_the_next_run(built: Built, session: Session):
    one, other = built.captured.inputs[:2], built.captured.inputs[2:4]
    with session:
        first = session.run({"images": one})["logits"]
        kept = first.copy()
        session.run({"images": other})
        np.testing.assert_array_equal(first, kept)


def test_layer_times_are_those_of_its_layers(built: Built, session: Session):
    if not isinstance(built.backend, LayerProfiler):
        pytest.skip(f"{built.backend.name} has no profiler")
    times = built.backend.layer_times(built.artifact, built.profile, {"images": built.captured.inputs[:1]}, 3)
    assert sum(layer.ms for layer in times) > 0
    assert len({layer.name for layer in times}) == len(times)
    known = {layer.name: layer.precision for layer in built.artifact.layers}
    assert 2 * sum(layer.name in known for layer in times) > len(times), "the profiler's names are not the layer table's"
    assert all(layer.precision == known[layer.name] for layer in times if layer.name in known)
    weighted = {layer.name for layer in built.artifact.layers if layer.weighted}
    timed = weighted & {layer.name for layer in times}
    assert 2 * len(timed) > len(weighted)
    nodes = {layer.macs for layer in costs(times, work(built.captured.graph.path), PEAKS)} - {None}
    assert nodes, "no layer is found again in the graph"


def test_its_own_files_open_as_if_others_had_built_them(built: Built, session: Session):
    backend, artifact = built.backend, built.artifact
    if not isinstance(backend, FileOpener):
        pytest.skip(f"{backend.name} opens only what it has built")
    assert artifact.path.suffix in backend.suffixes
    found = backend.describe_file(artifact.path, built.profile)
    assert [(spec.name, spec.shape[1:], spec.dtype) for spec in found.inputs] == [("images", (3, 32, 32), "float32")]
    assert {record.sha256 for record in found.files} == {record.sha256 for record in artifact.files}
    weighted = {layer.name: layer.precision for layer in artifact.layers if layer.weighted}
    assert {layer.name for layer in found.layers if layer.weighted} == weighted.keys()
    with backend.open_file(found, built.profile) as opened:
        logits = run_in_batches(opened, built.captured.inputs, 8)
    assert logits.shape == built.captured.logits.shape
    assert np.isfinite(logits).all()


def test_names_the_device(session: Session):
    with session:
        assert session.device


@pytest.mark.parametrize("name", backend_names())
def test_int8_without_calibration_is_refused(name: str, captured: dict[str, Captured], tmp_path: Path):
    backend, profile = get_backend(name), profile_for(name)
    for recipe in _buildable(backend, captured["cnn"]):
        if recipe.needs_calibration:
            with pytest.raises(BuildError, match="calibration"):
                backend.build(captured["cnn"].graph, recipe, None, tmp_path)
    assert profile.runtime == name


def _buildable(backend: Backend, captured: Captured) -> list[Recipe]:
    profile = profile_for(backend.name)
    if not backend.probe(profile).can_build:
        pytest.skip(f"{backend.name} cannot build here: {backend.probe(profile).reason}")
    return list(backend.recipes(profile, captured.graph))


@pytest.mark.parametrize("name", backend_names())
def test_altered_graph_is_refused(name: str, captured: dict[str, Captured], tmp_path: Path):
    backend, whole = get_backend(name), captured["cnn"]
    recipe = _buildable(backend, whole)[-1]
    path = tmp_path / "model.onnx"
    data = bytearray(whole.graph.path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises((IntegrityError, BackendError)):
        backend.build(whole.graph.model_copy(update={"path": path}), recipe, whole.calibration, tmp_path)


def _cosine(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """Mean cosine similarity of two sets of logits (B,classes)."""
    norms = np.linalg.norm(found, axis=1) * np.linalg.norm(expected, axis=1)
    return float(np.mean(np.sum(found * expected, axis=1) / norms))
