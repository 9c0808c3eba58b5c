"""Models as they are: files that others built, measured by their own shapes and told in the precision that really runs."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from tiny import SIDE, build, run_cli, write_graph

from fofa_deploy.backend import get_backend
from fofa_deploy.cli import cli
from fofa_deploy.config import AccuracyPlan, LimitsPlan, MeasurePlan
from fofa_deploy.errors import BackendError, DataError, GraphError, IntegrityError, UnavailableError, UserError
from fofa_deploy.files import FileRequest, FileRow, Subject, Wish, describe, given, measure_files, noise, subjects
from fofa_deploy.profile import find_profile
from fofa_deploy.progress import Quiet
from fofa_deploy.runner.machine import cpu_flags
from fofa_deploy.tune import Settings
from fofa_deploy.types import Budget, digest_file

QUICK = MeasurePlan(seconds=0.02, max_seconds=0.1, warmup_seconds=0.01, warmup_runs=5)
SETTINGS = Settings(AccuracyPlan(), QUICK, LimitsPlan(run_seconds=60), Budget(), 0)


def measured(*sources: Path, batches: tuple[int, ...] = (), threads: tuple[int, ...] = (1,), **wish) -> list[FileRow]:
    settings = Settings(AccuracyPlan(), QUICK, LimitsPlan(run_seconds=60), Budget(), 0, batches=batches, threads=threads)
    asked = Wish(**wish)
    return measure_files(subjects(sources, asked, settings), asked, settings, Quiet())


def looked_at(path: Path, target: str, **options) -> Subject:
    """In this process, which has the runtimes already."""
    profile = find_profile(target)
    return Subject(path, profile, describe(FileRequest(path=path, profile=profile, trusted=options.get("trusted", False))))


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """A bare ONNX file, a bare IR, and the folder of an artifact."""
    root = tmp_path_factory.mktemp("files")
    graph = write_graph(root / "graph")
    built, bare = build(graph, "cpu-openvino", root / "openvino"), root / "bare"
    bare.mkdir()
    for file in (graph.path, built / "model.xml", built / "model.bin"):
        shutil.copy(file, bare)
    return {"onnx": bare / "model.onnx", "ir": bare / "model.xml", "folder": build(graph, "cpu-onnxruntime", root / "folder")}


def text_model(path: Path, batch: object = "batch", length: object = "length") -> Path:
    """scores (B,L,2) = table[tokens] + offset, of two inputs: int64 (B,L) and float32 (2)."""
    make, kinds = onnx.helper, onnx.TensorProto
    inputs = [
        make.make_tensor_value_info("tokens", kinds.INT64, [batch, length]),
        make.make_tensor_value_info("offset", kinds.FLOAT, [2]),
    ]
    output = make.make_tensor_value_info("scores", kinds.FLOAT, [batch, length, 2])
    nodes = [make.make_node("Gather", ["table", "tokens"], ["rows"]), make.make_node("Add", ["rows", "offset"], ["scores"])]
    table = onnx.numpy_helper.from_array(np.eye(2, dtype=np.float32), "table")
    graph = make.make_graph(nodes, "text", inputs, [output], [table])
    onnx.save(make.make_model(graph, opset_imports=[make.make_opsetid("", 18)], ir_version=9), path)
    return path


# --- what is told


def test_files_and_artifacts_stand_side_by_side(models):
    rows = measured(*models.values())
    assert [(row.model, row.target) for row in rows] == [
        (str(models["onnx"]), "cpu-onnxruntime"),
        (str(models["ir"]), "cpu-openvino"),
        (str(models["folder"]), "cpu-onnxruntime"),
    ]
    for row in rows:
        assert (row.reason, row.inputs) == ("", {"images": (1, 1, SIDE, SIDE)})
        preferred = "bf16" if row.target == "cpu-openvino" and "avx512_bf16" in cpu_flags() else "fp32"
        assert row.precision == {preferred: 1}
        assert row.measurement.artifact_sha256 == row.sha256
        assert 0 < row.measurement.latency_ms.min <= row.measurement.latency_ms.p50
        assert row.environment.cores
    assert rows[0].sha256 == digest_file(models["onnx"])
    assert rows[0].measurement.device == "CPUExecutionProvider"
    weights = models["ir"].with_suffix(".bin").stat().st_size
    assert rows[1].size_bytes == models["ir"].stat().st_size + weights


def test_one_file_on_two_runtimes_at_two_batch_sizes(models):
    targets = (find_profile("cpu-onnxruntime"), find_profile("cpu-openvino"))
    rows = measured(models["onnx"], targets=targets, batches=(1, 3), threads=(2,))
    assert [(row.runtime, row.measurement.batch, row.measurement.threads) for row in rows] == [
        ("onnxruntime", 1, 2),
        ("onnxruntime", 3, 2),
        ("openvino", 1, 2),
        ("openvino", 3, 2),
    ]


def test_the_precision_is_that_of_the_kernels(models, tmp_path):
    """Whatever the file is called."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    from fofa_exporters._onnx import quiet

    with quiet():
        quantize_dynamic(models["onnx"], tmp_path / "fp32.onnx", weight_type=QuantType.QInt8)
    (row,) = measured(tmp_path / "fp32.onnx")
    assert row.precision == {"int8": 1}


# --- inputs


def test_an_open_axis_has_to_be_given(tmp_path):
    model = text_model(tmp_path / "text.onnx")
    with pytest.raises(UserError) as caught:
        noise(looked_at(model, "cpu-onnxruntime"), 1, {}, 0)
    assert "tokens ?x? int64 has more than its first axis open" in caught.value.message
    assert "--shape tokens=1x1" in caught.value.action
    (row,) = measure_files([looked_at(model, "cpu-onnxruntime")], Wish(shapes={"tokens": (2, 7)}), SETTINGS, Quiet())
    assert row.inputs == {"tokens": (2, 7), "offset": (2,)}
    assert row.measurement.batch == 2


@pytest.mark.parametrize("shape", [(2,), (2, 3, 4)])
def test_a_shape_that_does_not_fit_is_refused(tmp_path, shape):
    with pytest.raises(UserError, match=r"takes tokens \?x\? int64, not 2"):
        noise(looked_at(text_model(tmp_path / "text.onnx"), "cpu-openvino"), 1, {"tokens": shape}, 0)


def test_a_shape_for_nobody_is_refused(models, tmp_path):
    wish = Wish(shapes={"pixels": (1, 1, 4, 4)})
    with pytest.raises(UserError, match="no model here has an input 'pixels'"):
        measure_files([looked_at(models["onnx"], "cpu-onnxruntime")], wish, SETTINGS, Quiet())
    with pytest.raises(UserError, match=r"has 2 inputs \(tokens, offset\)"):
        noise(looked_at(text_model(tmp_path / "text.onnx"), "cpu-onnxruntime"), 1, {"": (1, 1)}, 0)


def test_a_fixed_batch_is_measured_as_it_is_and_not_as_another(tmp_path):
    model = text_model(tmp_path / "text.onnx", batch=5, length=3)
    found = looked_at(model, "cpu-onnxruntime")
    (row,) = measure_files([found], Wish(), SETTINGS, Quiet())
    assert row.measurement.batch == 5
    with pytest.raises(UserError, match=r"takes tokens 5x3 int64 alone, not a batch of 2"):
        noise(found, 2, {}, 0)


def test_given_inputs_are_what_runs(tmp_path):
    """An index beyond the table fails in the runtime, so the arrays do arrive there."""
    model = text_model(tmp_path / "text.onnx")
    offset = np.zeros(2, np.float32)
    np.savez(tmp_path / "good.npz", tokens=np.ones((3, 4), np.int64), offset=offset, more=offset)
    np.savez(tmp_path / "bad.npz", tokens=np.full((3, 4), 9), offset=offset)
    found = looked_at(model, "cpu-onnxruntime")
    (good,) = measure_files([found], Wish(inputs=tmp_path / "good.npz"), SETTINGS, Quiet())
    assert (good.inputs["tokens"], good.measurement.batch) == ((3, 4), 3)
    (bad,) = measure_files([found], Wish(inputs=tmp_path / "bad.npz"), SETTINGS, Quiet())
    assert bad.measurement is None
    assert "out of data bounds" in bad.reason


def test_an_array_by_itself_is_the_only_input(models, tmp_path):
    np.save(tmp_path / "images.npy", np.zeros((6, 1, SIDE, SIDE), np.float32))
    found = given(tmp_path / "images.npy", looked_at(models["ir"], "cpu-openvino"))
    assert found["images"].shape[0] == 6


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"tokens": np.zeros((1, 1), np.int64)}, "no array 'offset'"),
        ({"tokens": np.zeros((1, 1), np.int32), "offset": np.zeros(2, np.float32)}, "in int32: tokens"),
        ({"tokens": np.zeros((1, 1), np.int64), "offset": np.zeros(3, np.float32)}, "takes offset 2 float32, not 3"),
        ({"tokens": np.array([{}], object)}, "holds no arrays"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(tmp_path, arrays, words):
    np.savez(tmp_path / "inputs.npz", **arrays)
    with pytest.raises(UserError, match=words):
        given(tmp_path / "inputs.npz", looked_at(text_model(tmp_path / "text.onnx"), "cpu-onnxruntime"))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 not really", b"\x93NUMPY"])
def test_junk_holds_no_inputs(models, tmp_path, content):
    (tmp_path / "inputs.npz").write_bytes(content)
    with pytest.raises(DataError, match="holds no arrays"):
        given(tmp_path / "inputs.npz", looked_at(models["onnx"], "cpu-onnxruntime"))


# --- what reaches a runtime


def with_operator(folder: Path, domain: str, kind: str) -> Path:
    write_graph(folder)
    model = onnx.load(folder / "model.onnx")
    model.graph.node.insert(1, onnx.helper.make_node(kind, ["flat"], ["more"], domain=domain))
    model.graph.node[2].input[0] = "more"
    model.opset_import.append(onnx.helper.make_opsetid(domain, 1))
    onnx.save(model, folder / "model.onnx")
    return folder / "model.onnx"


def test_onnx_runtimes_own_operators_are_taken(tmp_path):
    (row,) = measured(with_operator(tmp_path, "com.microsoft", "QuickGelu"))
    assert row.measurement


@pytest.mark.parametrize("target", ["cpu-onnxruntime", "cpu-openvino"])
@pytest.mark.parametrize(
    ("domain", "kind", "words"),
    [("evil.example", "Anything", "outside the ONNX standard"), ("com.microsoft", "EPContext", "machine code")],
)
def test_foreign_operators_and_embedded_code_are_refused(tmp_path, target, domain, kind, words):
    with pytest.raises(GraphError, match=words):
        looked_at(with_operator(tmp_path, domain, kind), target)


@pytest.mark.parametrize("target", ["cpu-onnxruntime", "cpu-openvino"])
def test_weights_in_other_files_are_refused(tmp_path, target):
    write_graph(tmp_path)
    model = onnx.load(tmp_path / "model.onnx")
    onnx.save(model, tmp_path / "model.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0)
    with pytest.raises(GraphError, match="weights in other files"):
        looked_at(tmp_path / "model.onnx", target)


@pytest.mark.parametrize(
    ("name", "target", "error"),
    [
        ("junk.onnx", "cpu-onnxruntime", GraphError),
        ("junk.onnx", "cpu-openvino", GraphError),
        ("junk.xml", "cpu-openvino", BackendError),
    ],
)
def test_junk_is_named(tmp_path, name, target, error):
    (tmp_path / name).write_bytes(b"junk")
    with pytest.raises(error, match=name):
        looked_at(tmp_path / name, target)


def test_a_missing_bin_is_told(models, tmp_path):
    shutil.copy(models["ir"], tmp_path)
    with pytest.raises(BackendError, match=r"there is no model\.bin beside it"):
        looked_at(tmp_path / "model.xml", "cpu-openvino")


@pytest.mark.parametrize(("name", "altered"), [("model.onnx", "model.onnx"), ("model.xml", "model.bin")])
def test_what_was_checked_is_what_is_opened(models, tmp_path, name, altered):
    for file in models["onnx"].parent.iterdir():
        shutil.copy(file, tmp_path)
    found = looked_at(tmp_path / name, "cpu-onnxruntime" if name == altered else "cpu-openvino")
    data = bytearray((tmp_path / altered).read_bytes())
    data[-1] ^= 1
    (tmp_path / altered).write_bytes(data)
    with pytest.raises(IntegrityError, match=rf"{altered} is missing or altered since it was checked"):
        get_backend(found.profile.runtime).open_file(found.model, found.profile)


@pytest.mark.parametrize("suffix", [".engine", ".plan", ".trt"])
@pytest.mark.parametrize("target", ["datacenter-gpu", "rtx-desktop"])
def test_an_engine_is_opened_for_those_who_trust_it_alone(tmp_path, suffix, target):
    file = tmp_path / f"model{suffix}"
    file.write_bytes(b"what could be in it?")
    with pytest.raises(IntegrityError) as caught:
        looked_at(file, target)
    assert "is machine code" in caught.value.message
    assert "--trust-engine" in caught.value.action


def test_an_artifact_is_an_engine_by_its_back_end_and_not_by_its_name(tmp_path):
    """Its record is its own word: a main file of any name reaches the runtime that the record names."""
    folder = build(write_graph(tmp_path / "graph"), "cpu-onnxruntime", tmp_path / "built")
    record = folder / "artifact.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"backend": "tensorrt-rtx"}))
    with pytest.raises(IntegrityError, match="is machine code"):
        subjects([folder], Wish(targets=(find_profile("rtx-desktop"),)), SETTINGS)


def test_what_a_device_has_yet_to_build_is_no_engine(tmp_path):
    folder = build(write_graph(tmp_path / "graph"), "cpu-onnxruntime", tmp_path / "built")
    record = folder / "artifact.json"
    told = json.loads(record.read_text()) | {"backend": "tensorrt-rtx"}
    told["recipe"]["options"]["on_device"] = True
    record.write_text(json.dumps(told))
    assert subjects([folder], Wish(targets=(find_profile("rtx-desktop"),)), SETTINGS)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"backend": 1, "files": [null]}'])
def test_an_artifact_without_a_sound_record_is_told(tmp_path, content):
    (tmp_path / "artifact.json").write_text(content)
    with pytest.raises(IntegrityError, match=r"artifact\.json is no record of an artifact"):
        subjects([tmp_path], Wish(), SETTINGS)


def test_a_trusted_engine_needs_its_device(tmp_path):
    backend, profile = get_backend("tensorrt-rtx"), find_profile("rtx-desktop")
    probe = backend.probe(profile)
    if not probe.can_build:
        pytest.skip(f"no engine can be built here: {probe.reason}")
    engine = build(write_graph(tmp_path / "graph"), "rtx-desktop", tmp_path / "built") / "model.engine"
    with pytest.raises(IntegrityError, match="is machine code"):
        subjects([engine.parent], Wish(targets=(profile,)), SETTINGS)
    assert subjects([engine.parent], Wish(targets=(profile,), trusted=True), SETTINGS)[0].inputs[0].name == "images"
    if probe.can_run:
        (row,) = measured(engine, targets=(profile,), trusted=True)
        assert (row.measurement.device, row.inputs) == ("cuda:0", {"images": (1, 1, SIDE, SIDE)})
        return
    with pytest.raises(BackendError, match="cannot run here: no CUDA device"):
        looked_at(engine, "rtx-desktop", trusted=True)


# --- what does not go together


@pytest.mark.parametrize(
    ("name", "target", "error", "words"),
    [
        ("model.txt", None, UserError, "of no known kind"),
        ("model.onnx", "reference", UserError, "takes only what it has built"),
        ("model.onnx", "datacenter-gpu", UserError, r"does not open model\.onnx: it takes \.engine"),
        ("model.xml", "cpu-onnxruntime", UserError, r"it takes \.onnx"),
        ("folder", None, DataError, "is no artifact's folder"),
    ],
)
def test_a_model_and_its_target_have_to_fit(tmp_path, name, target, error, words):
    (tmp_path / "folder").mkdir()
    (tmp_path / name).touch() if "." in name else None
    with pytest.raises(error, match=words):
        looked_at(tmp_path / name, target) if target else measured(tmp_path / name)


def test_an_artifact_is_not_run_by_another_runtime(models):
    with pytest.raises(UserError, match="was built for onnxruntime, cpu-openvino runs openvino"):
        measured(models["folder"], targets=(find_profile("cpu-openvino"),))


def test_another_machine_is_not_this_one(models):
    profile = find_profile("cpu-onnxruntime")
    device = profile.device.model_copy(update={"features": ("no_such_flag",)})
    other = profile.model_copy(update={"device": device})
    with pytest.raises(UnavailableError, match="this CPU lacks no_such_flag"):
        measure_files([replace(looked_at(models["onnx"], profile.name), profile=other)], Wish(), SETTINGS, Quiet())


def test_one_that_fails_while_it_runs_is_its_reason_and_the_others_go_on(models, tmp_path):
    found = looked_at(models["onnx"], "cpu-onnxruntime")
    gone = replace(found, model=found.model.model_copy(update={"path": tmp_path / "gone.onnx"}))
    rows = measure_files([gone, found], Wish(), SETTINGS, Quiet())
    assert [row.measurement is None for row in rows] == [True, False]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["a.onnx", "b.onnx", "--profile", "cpu-onnxruntime"], "say --target instead"),
        (["a.onnx", "--target", "cpu-openvino", "--profile", "cpu-openvino"], "give --target alone"),
        (["a.onnx", "--recipe", "fp32"], "measured as they are"),
        (["a.onnx", "--inputs", "a.npz", "--batch", "2"], "has its own shapes"),
        (["a.onnx", "--shape", "1x2", "--batch", "2"], "the whole shape"),
        (["a.onnx", "--on", "board"], "run on this machine"),
        (["a.onnx", "--shape", "1x0"], "is no shape"),
        (["a.onnx", "--shape", "x=1,2"], "is no shape"),
        (["--json", "a.onnx", "b.onnx"], r"does not end in \.json"),
        ([], "Missing argument"),
    ],
)
def test_options_that_contradict_each_other_are_refused(tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    for name in ("a.onnx", "b.onnx", "a.npz"):
        (tmp_path / name).touch()
    shown = CliRunner().invoke(cli, ["profile", *arguments])
    assert shown.exit_code == 2
    assert re.search(words, shown.output), shown.output


def test_the_command_line_tells_and_writes(models, tmp_path):
    arguments = (models["onnx"], models["folder"], "--batch", "2", "--json", tmp_path / "figures.json", "--quiet")
    shown = run_cli("profile", *arguments)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.splitlines()[0].split()[:2] == ["model", "target"]
    assert shown.stdout.count("1 fp32") == 2
    found = json.loads((tmp_path / "figures.json").read_text())
    assert [(row["model"], row["measurement"]["batch"]) for row in found] == [(str(models[name]), 2) for name in ("onnx", "folder")]
    assert all(row["measurement"]["latency_ms"]["p50"] > 0 for row in found)


def test_the_command_line_refuses_an_engine(tmp_path):
    (tmp_path / "model.engine").write_bytes(b"")
    shown = run_cli("profile", "model.engine", cwd=tmp_path)
    assert shown.returncode == IntegrityError.exit_code
    assert shown.stderr.splitlines()[-1] == "  -> if you built it, or trust who did, say so with --trust-engine"
