"""Faults and attacks that no other file tries: what a run meets when people, files and machines misbehave.

Elsewhere: checkpoints in test_models, images and labels in test_data, ONNX files in exporters/test_onnx, names that would be
markup in report/test_report, crashes and hangs in test_isolate, kills and full disks in test_store, TOML in test_schema.
"""

import ast
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from tiny import SIDE, build, run_cli, write_graph

from fofa_deploy.adopt import KEY, Preparation, read_sidecar
from fofa_deploy.config import RunPlan, load_plan
from fofa_deploy.errors import GraphError, IntegrityError, PlanError
from fofa_deploy.lookup import look_up
from fofa_deploy.pipeline import PLAN, record_plan, reopened
from fofa_deploy.progress import Quiet
from fofa_deploy.store import Store
from fofa_deploy.types import Artifact, digest_file

ROOT = Path(__file__).parents[1]
SOURCES = [p for base in ("fofa_deploy", "exporters", "profiles") for p in sorted((ROOT / base).rglob("*.py"))]
ODD = "a b 'c' \"d\" $(touch ran) ; ä"


# --- what the code never does

FORBIDDEN = {"eval", "exec", "os.system", "os.popen", "pickle.load", "pickle.loads", "torch.jit.load", "yaml.load"}


def calls(path: Path) -> list[tuple[str, ast.Call]]:
    return [(ast.unparse(node.func), node) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]


def keyword(call: ast.Call, name: str) -> object:
    return next((ast.unparse(k.value) for k in call.keywords if k.arg == name), None)


def dangerous(name: str, call: ast.Call) -> bool:
    return (
        name in FORBIDDEN
        or (name == "torch.load" and keyword(call, "weights_only") != "True")
        or keyword(call, "allow_pickle") not in (None, "False")
        or keyword(call, "shell") is not None
    )


def test_no_file_is_run_for_what_it_contains():
    assert len(SOURCES) > 60
    assert [f"{path}:{call.lineno} {name}" for path in SOURCES for name, call in calls(path) if dangerous(name, call)] == []


@pytest.mark.parametrize("code", ["eval(x)", "torch.load(p)", "np.load(p, allow_pickle=True)", "subprocess.run(c, shell=True)"])
def test_the_search_for_dangerous_calls_finds_them(code):
    (call,) = (node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call))
    assert dangerous(ast.unparse(call.func), call)


# --- ready-made ONNX files


def changed(folder: Path, change) -> Path:
    write_graph(folder)
    (folder / "sidecar.json").unlink()
    model = onnx.load(folder / "model.onnx")
    change(model)
    onnx.save(model, folder / "model.onnx")
    return folder / "model.onnx"


def test_a_file_without_a_sidecar_is_described_by_its_own_shapes(tmp_path):
    sidecar = read_sidecar(changed(tmp_path, lambda model: None), Preparation(mean=(0.1,), std=(0.2,)))
    assert (sidecar.input.shape, sidecar.output.shape) == ((None, 1, SIDE, SIDE), (None, 3))
    assert (sidecar.preprocessing.mean, sidecar.preprocessing.std) == ((0.1,), (0.2,))


@pytest.mark.parametrize("text", ["{", "[]", '{"model": "m"}', "null", "9" * 5000])
@pytest.mark.parametrize("inside", [True, False])
def test_a_forged_sidecar_is_refused(tmp_path, text, inside):
    file = changed(tmp_path, lambda model: onnx.helper.set_model_props(model, {KEY: text}) if inside else None)
    if not inside:
        (tmp_path / "sidecar.json").write_text(text)
    with pytest.raises(GraphError, match=r"sidecar in .* is not one of ours"):
        read_sidecar(file, Preparation())


def sides(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "height"


def another_input(model: onnx.ModelProto) -> None:
    model.graph.input.append(onnx.helper.make_tensor_value_info("more", onnx.TensorProto.FLOAT, [1]))


def outside(model: onnx.ModelProto) -> None:
    tensor = model.graph.initializer[0]
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.ClearField("raw_data")
    tensor.external_data.add(key="location", value="../../../../etc/hostname")


def one_by_one(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1


def beside(model: onnx.ModelProto) -> None:
    """As exporters write it unless they are told otherwise."""
    tensor = model.graph.initializer[0]
    Path("weights.data").write_bytes(tensor.raw_data)
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.ClearField("raw_data")
    tensor.external_data.add(key="location", value="weights.data")


REFUSED = [
    *((sides, "dynamic sides"), (another_input, "not images"), (outside, "not a valid ONNX file")),
    *((one_by_one, "takes batches of 1 alone"), (beside, "keeps 1 of its weights in another file")),
]


@pytest.mark.parametrize(("change", "words"), REFUSED)
def test_a_file_that_is_no_plain_classifier_is_refused(tmp_path, monkeypatch, change, words):
    monkeypatch.chdir(tmp_path)
    write_graph(tmp_path)
    (tmp_path / "sidecar.json").unlink()
    model = onnx.load(tmp_path / "model.onnx")
    change(model)
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(GraphError, match=words):
        read_sidecar(tmp_path / "model.onnx", Preparation())


@pytest.mark.parametrize("content", [b"", b"\0" * 100, b"<html>", b"\x08\xff" * 50])
def test_junk_is_no_onnx_file(tmp_path, content):
    (tmp_path / "junk.onnx").write_bytes(content)
    with pytest.raises(GraphError, match=r"junk.onnx"):
        read_sidecar(tmp_path / "junk.onnx", Preparation())


# --- run directories


def test_another_plan_in_the_same_folder_is_refused_and_says_what_changed(tmp_path):
    first, other = load_plan("demo"), load_plan("demo", ("seed=7", "distill.epochs=2"))
    with Store(tmp_path) as store:
        record_plan(store, other, look_up(other), force=False)
        record_plan(store, first, look_up(first), force=False)  # nothing has been made from the other one yet
        store.run("data", {}, lambda out: None)
        record_plan(store, first, look_up(first), force=False)
        with pytest.raises(PlanError) as caught:
            record_plan(store, other, look_up(other), force=False)
        assert "distill.epochs was 10, is 2; seed was 0, is 7" in caught.value.message
        assert "--force" in caught.value.action
        assert RunPlan.model_validate_json((tmp_path / PLAN).read_bytes()) == first
        record_plan(store, other, look_up(other), force=True)
    assert RunPlan.model_validate_json((tmp_path / PLAN).read_bytes()) == other


@pytest.mark.parametrize("content", ["", "{", '{"name": "demo"}'])
def test_a_damaged_plan_in_a_run_directory_is_named(tmp_path, content):
    (tmp_path / PLAN).write_text(content)
    with pytest.raises(PlanError, match=PLAN):
        reopened(tmp_path, Quiet(), stored=True).__enter__()
    with Store(tmp_path) as store:
        store.run("data", {}, lambda out: None)
        with pytest.raises(PlanError, match=PLAN):
            record_plan(store, load_plan("demo"), look_up(load_plan("demo")), force=False)


def test_a_missing_artifact_file_is_named(tmp_path):
    from tiny import build

    folder = build(write_graph(tmp_path / "graph"), "reference", tmp_path / "artifact")
    (folder / "model.onnx").unlink()
    with pytest.raises(IntegrityError, match=r"model.onnx is missing or altered"):
        Artifact.load(folder)


# --- whole commands


def test_an_odd_path_is_a_path_like_any_other(tmp_path):
    folder = tmp_path / ODD
    write_graph(folder / "graph")
    shown = run_cli("quantize", folder / "graph" / "model.onnx", "--profile", "reference", "--json", "--quiet", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert json.loads(shown.stdout)[0]["status"] == "verified"
    assert not (tmp_path / "ran").exists()


def test_a_runtime_that_is_not_there_is_skipped_with_its_reason(tmp_path):
    write_graph(tmp_path / "graph")
    profile = 'name = "mine"\ndescription = "d"\nruntime = "onnxruntim"\nprecisions = ["fp32"]\n'
    (tmp_path / "mine.toml").write_text(profile)
    arguments = ("--profile", tmp_path / "mine.toml", "--json", "--quiet")
    shown = run_cli("quantize", tmp_path / "graph" / "model.onnx", *arguments)
    assert shown.returncode == 3, shown.stderr
    (row,) = json.loads(shown.stdout)
    assert (row["status"], row["target"]) == ("skipped", "mine")
    assert "no back end is named 'onnxruntim'" in row["reason"]


def test_two_runs_in_one_folder(tmp_path):
    with Store(tmp_path / "run"):
        shown = run_cli("compress-and-export", "demo", "--out", tmp_path / "run")
    assert shown.returncode == 3
    assert f"in use by process {os.getpid()}" in shown.stderr


def test_ctrl_c_says_how_to_go_on_and_leaves_a_folder_to_go_on_in(tmp_path):
    often = "teacher.fit.checkpoint_seconds=0.01"
    command = [sys.executable, "-m", "fofa_deploy", "compress-and-export", "demo", "--out", str(tmp_path / "run"), "--set", often]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob("run/.scratch/teacher-*/checkpoints/*.pt")) and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert "again" in err.splitlines()[-1]
    assert out == ""
    assert load_plan(str(tmp_path / "run" / PLAN)) == load_plan("demo", (often,))
    assert list(tmp_path.glob("run/.scratch/teacher-*/checkpoints/*.pt"))


@pytest.mark.parametrize("where", ["under a file", "not writable"])
def test_an_output_folder_that_cannot_be_made_is_told_before_any_work(tmp_path, where):
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "run" if where == "under a file" else Path("/proc/run")
    shown = run_cli("compress-and-export", "demo", "--out", out)
    assert shown.returncode == 2
    assert shown.stderr.startswith(f"error: cannot write to {out}")


def test_numbers_that_are_not_numbers_never_reach_a_record():
    from fofa_deploy.results import Latency

    for value in (np.nan, np.inf):
        with pytest.raises(ValueError, match="finite"):
            Latency(min=value, mean=1, p50=1)


@pytest.mark.parametrize(
    ("preparation", "sides", "words"),
    [
        (Preparation(mean=(0.4, 0.5, 0.6)), None, "mean"),
        (Preparation(), (2, 2), "image_size"),
        (Preparation(), (5000, 5000), "image_size"),
    ],
)
def test_a_file_that_no_images_could_be_made_for_is_told(tmp_path, preparation, sides, words):
    def resized(model):
        for dim, side in zip(model.graph.input[0].type.tensor_type.shape.dim[2:], sides or (SIDE, SIDE), strict=True):
            dim.dim_value = side

    with pytest.raises(GraphError, match=words):
        read_sidecar(changed(tmp_path, resized), preparation)


@pytest.mark.parametrize(
    "change", [{"image_size": [1_000_000, 1_000_000]}, {"crop_fraction": 0.0}, {"mean": [0.5, 0.5]}, {"image_size": [8, 8]}]
)
def test_a_sidecar_that_does_not_fit_its_graph_is_refused(tmp_path, change):
    graph = write_graph(tmp_path / "graph")
    told = json.loads((tmp_path / "graph" / "sidecar.json").read_text())
    told["preprocessing"].update(change)
    (tmp_path / "graph" / "sidecar.json").write_text(json.dumps(told))
    with pytest.raises(GraphError, match="the sidecar in"):
        read_sidecar(graph.path, Preparation())


def test_an_artifact_from_elsewhere_is_held_to_what_files_are(tmp_path):
    """Weights outside of its digest, behind a link that is none."""
    folder = build(write_graph(tmp_path / "graph"), "cpu-onnxruntime", tmp_path / "built")
    model = onnx.load(folder / "model.onnx")
    onnx.save(model, folder / "model.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    record = json.loads((folder / "artifact.json").read_text())
    record["files"][0]["sha256"] = digest_file(folder / "model.onnx")
    (folder / "artifact.json").write_text(json.dumps(record))
    done = run_cli("profile", folder)
    assert done.returncode == 2
    assert "keeps weights in other files" in done.stderr
