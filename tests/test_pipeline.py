"""The whole job on a small scale, with real runtimes: run, run again, kill, change, and a back end from elsewhere."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import zipfile
from pathlib import Path

import pytest
from PIL import Image
from tiny import write_graph

from fofa_deploy import diagnosis, environment
from fofa_deploy.cli import cli
from fofa_deploy.config import AccuracyPlan, LimitsPlan, MeasurePlan, load_plan
from fofa_deploy.errors import ChildError, IntegrityError, PlanError
from fofa_deploy.judge import failures
from fofa_deploy.pipeline import compress_and_export, reopened
from fofa_deploy.profile import find_profile
from fofa_deploy.progress import Quiet
from fofa_deploy.report import read_report
from fofa_deploy.store import Store, manifests
from fofa_deploy.tune import Evidence, Settings
from fofa_deploy.tune.workbench import Workbench
from fofa_deploy.types import Artifact, Budget, Graph, Status

PAGE = Path(__file__).parents[1] / "docs" / "python.md"
SMALL = (
    "threads=1",
    "data.limit=160",
    "data.image_size=16",
    "teacher.arguments={channels=[8,16,16,32],stem_width=8}",
    "teacher.fit={epochs=2,batch_size=32,lr=3e-3,warmup_epochs=0.2}",
    "teacher.floor_top1=0.0",
    "student.arguments={patch_size=4,embed_dim=32,depth=2,num_heads=2}",
    "distill.epochs=2",
    "distill.fofa={stages=2,width=16,heads=2,prompted_stages=[2]}",
    "accuracy.max_top1_drop=1.0",
    "measure={seconds=0.2,max_seconds=0.5}",
)


def small_plan(*more: str):
    return load_plan("demo", [*SMALL, *more])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "small run"
    return out, compress_and_export(small_plan(), out, Quiet())


def fofa_deploy(*arguments: object, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fofa_deploy", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)


def photographs(folder: Path) -> Path:
    """24 images that differ, small files without labels."""
    images = folder / "images"
    images.mkdir()
    for number in range(24):
        Image.linear_gradient("L").rotate(15 * number).resize((20, 20)).save(images / f"{number}.png")
    return images


def rows(report, target):
    return [row for row in report.targets if row.target == target]


@pytest.mark.parametrize("target", ["cpu-onnxruntime", "cpu-openvino"])
def test_runnable_targets_end_verified_with_latency_and_accuracy_of_the_artifact(finished, target):
    chosen = [row for row in rows(finished[1], target) if row.chosen]
    assert len(chosen) == 1
    row = chosen[0]
    assert row.status is Status.VERIFIED
    assert row.latency_ms is not None
    assert row.latency_ms.min <= row.latency_ms.p50
    assert row.speedup is not None
    assert row.peak_rss_bytes is not None
    assert row.top1 is not None
    assert row.validation is not None
    assert row.precision
    tried = {other.recipe for other in rows(finished[1], target)}
    assert len(tried) >= 2, "int8 and fp32 were both to be tried"


def test_tensorrt_is_built_and_says_why_it_did_not_run(finished):
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is an optional extra")
    out, report = finished
    found = rows(report, "rtx-desktop")
    assert found
    for row in found:
        if row.status is Status.VERIFIED:
            continue
        assert row.status is Status.BUILT_NOT_RUN
        assert "CUDA" in row.reason
        assert row.layer_types
        artifact = Artifact.load(out / row.artifact)
        assert artifact.path.suffix == ".engine"
        assert artifact.size_bytes > 1000


def test_a_bundle_goes_out_and_its_results_come_back_into_the_record(finished, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(finished[0], out)
    chosen = ("--profile", "cpu-onnxruntime", "--recipe", "fp32")
    done = fofa_deploy("bundle", out, *chosen, "--out", tmp_path / "b.zip", "--quiet")
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(tmp_path / "b.zip") as archive:
        archive.extractall(tmp_path / "there")
    subprocess.run([sys.executable, "run.py"], cwd=tmp_path / "there", check=True, timeout=120, capture_output=True)
    results = tmp_path / "there" / "results.json"
    done = fofa_deploy("profile", out, "--profile", "cpu-onnxruntime", "--import", results, "--quiet")
    assert done.returncode == 0, done.stderr
    (row,) = (row for row in read_report(out).targets if row.target.startswith("cpu-onnxruntime on "))
    assert (row.status, row.recipe) == (Status.VERIFIED, "fp32")
    assert row.golden.relative_error < 1e-3
    assert row.target in (out / "report.html").read_text()
    done = fofa_deploy("profile", out, "--profile", "cpu-onnxruntime", "--import", results, "--as", "front-door", "--quiet")
    assert done.returncode == 0, done.stderr
    told = {row.target for row in read_report(out).targets}
    assert {row.target, "cpu-onnxruntime on front-door"} <= told, "a board of the same kind is another"
    (out / "report.json").unlink()
    done = fofa_deploy("profile", out, "--profile", "cpu-onnxruntime", "--import", results, "--quiet")
    assert "not kept" in done.stderr
    elsewhere = tmp_path / "elsewhere.toml"
    architecture = "x86_64" if environment.describe().machine == "aarch64" else "aarch64"
    device = f'[device]\nname = "cpu"\narchitecture = "{architecture}"\n'
    elsewhere.write_text(f'name = "cpu-onnxruntime"\ndescription = "d"\nruntime = "onnxruntime"\nprecisions = ["fp32"]\n{device}')
    done = fofa_deploy("profile", out, "--profile", elsewhere, "--import", results, "--as", "front-door", "--quiet")
    assert done.returncode == 3
    assert f"is not of a cpu-onnxruntime: needs an {architecture} CPU" in done.stderr
    other = json.loads(results.read_text())
    other["files"]["golden.npy"] = "0" * 64
    results.write_text(json.dumps(other))
    done = fofa_deploy("profile", out, "--profile", "cpu-onnxruntime", "--import", results, "--quiet")
    assert done.returncode == 2
    assert "golden.npy" in done.stderr


def test_a_bundle_is_of_the_chosen_recipe_and_writes_over_nothing_else(finished, tmp_path):
    out, report = finished
    done = fofa_deploy("bundle", out, "--profile", "cpu-openvino", "--out", tmp_path / "below" / "b.zip", "--quiet")
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(tmp_path / "below" / "b.zip") as archive:
        job = json.loads(archive.read("job.json"))
    assert [job["recipe"]] == [row.recipe for row in rows(report, "cpu-openvino") if row.chosen]
    done = fofa_deploy("bundle", out, "--profile", "cpu-openvino", "--out", out / "plan.json", "--quiet")
    assert done.returncode == 2
    assert "does not end in .zip" in done.stderr
    done = fofa_deploy("bundle", out, "--profile", "raspberry-pi-5", "--recipe", "fp32", "--out", tmp_path / "c.zip", "--quiet")
    assert done.returncode == 2
    assert "there is no artifact for raspberry-pi-5" in done.stderr


def test_the_python_page_runs_what_was_deployed(finished, tmp_path, monkeypatch, capsys):
    """Its first two examples, on a run that is there."""
    job, deployed, _ = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished[0], tmp_path / "runs" / "flowers")
    job = job.replace('"plan.toml", ["measure.seconds=0.5"]', '"runs/flowers/plan.json"')
    for code in (job, deployed):
        exec(compile(code, str(PAGE), "exec"), {})
    told = capsys.readouterr().out
    assert all(f"{row.target} {row.recipe}" in told or not row.chosen for row in read_report(Path("runs/flowers")).targets)
    assert re.search(r"^\S+ \['\d'\]$", told, re.MULTILINE)


def test_the_folder_is_the_whole_record(finished):
    out, report = finished
    for name in ("plan.json", "report.json", "report.md", "report.html", "model_card.md", "graph/model.onnx", "graph/sidecar.json"):
        assert (out / name).is_file(), name
    assert read_report(out / "report.json") == report
    fields = json.loads((out / "report.json").read_text())
    assert fields["schema_version"] == 1
    assert {"model", "params", "top1"} <= fields["teacher"].keys()
    assert not list((out / ".scratch").iterdir())


def test_running_again_redoes_nothing_but_measurements(finished):
    out, before = finished
    keys = {manifest.stage: (manifest.key, manifest.finished_at) for manifest in manifests(out)}
    again = compress_and_export(small_plan(), out, Quiet())
    # Another recipe may be the fastest this time, by measurement; then its accuracy on the test split is read for the first time.
    first_chosen = {f"verification/{row.target}/{row.recipe}/test" for row in again.targets if row.chosen} - keys.keys()
    assert {timing.stage for timing in again.stages if not timing.reused} == first_chosen
    after = {manifest.stage: (manifest.key, manifest.finished_at) for manifest in manifests(out)}
    assert {stage: value for stage, value in after.items() if stage not in first_chosen} == keys
    assert again.targets[0].measurement.measured_at >= before.targets[0].measurement.measured_at
    assert again.student == before.student


def test_another_plan_in_the_same_folder_is_refused_and_told_apart(finished):
    with pytest.raises(PlanError, match=r"distill\.epochs was 2, is 3"):
        compress_and_export(small_plan("distill.epochs=3"), finished[0], Quiet())


def test_an_altered_artifact_is_named_and_built_again(finished):
    out, report = finished
    row = next(row for row in report.targets if row.target == "cpu-onnxruntime" and row.recipe == "fp32")
    path = Artifact.load(out / row.artifact).path
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    again = compress_and_export(small_plan(), out, Quiet())
    assert any(path.name in notice and "altered" in notice for notice in again.notices)
    assert next(r for r in again.targets if r.recipe == "fp32" and r.target == row.target).sha256 == row.sha256


def test_required_targets_decide_success(finished):
    report = finished[1]
    assert failures(small_plan(), report) == []
    found = failures(small_plan("required=['rtx-desktop']"), report)
    assert [error.exit_code for error in found] == [3] or any(row.chosen for row in rows(report, "rtx-desktop"))
    rejected = [row.model_copy(update={"status": Status.REJECTED, "chosen": False}) for row in report.targets]
    elsewhere = report.targets[0].model_copy(update={"target": "pi on a desk", "status": Status.VERIFIED, "chosen": True})
    for targets in (rejected, [*rejected, elsewhere]):
        found = failures(small_plan(), report.model_copy(update={"targets": tuple(targets)}))
        assert {error.exit_code for error in found} == {1}, "what a device told before is not what was tried now"


def test_verify_names_an_altered_artifact_and_repairs_nothing(finished):
    out, report = finished
    row = next(row for row in report.targets if row.target == "cpu-openvino" and row.recipe == "fp32")
    path = Artifact.load(out / row.artifact).path
    content = path.read_bytes()
    path.write_bytes(content[:-1] + b" ")
    done = fofa_deploy("verify", out, "--profile", "cpu-openvino", "--recipe", "fp32", "--json")
    assert done.returncode == 1
    found = json.loads(done.stdout)[0]
    assert found["status"] == "failed"
    assert path.name in found["reason"]
    assert path.read_bytes() == content[:-1] + b" "
    path.write_bytes(content)


def test_the_same_file_with_other_options_is_verified_anew(finished, tmp_path):
    """OpenVINO's IR is the same in fp32 and in bf16: the precision is told when it is compiled."""
    copy = tmp_path / "run"
    shutil.copytree(finished[0], copy)
    artifact = Artifact.load(copy / "artifacts" / "cpu-openvino" / "fp32")
    options = artifact.recipe.options | {"told": "later"}
    other = artifact.model_copy(update={"recipe": artifact.recipe.model_copy(update={"options": options})})
    settings = Settings(AccuracyPlan(), MeasurePlan(), LimitsPlan(), Budget(), seed=0)
    with Store(copy) as store:
        evidence, graph = Evidence(copy / "graph" / "golden.npz"), Graph.load(copy / "graph")
        bench = Workbench(store, copy / "graph", evidence, None, settings, Quiet(), graph)
        for one in (artifact, artifact, other):
            bench.verify(find_profile("cpu-openvino"), one, "validation")
        assert [stage.reused for stage in store.timings] == [False, True, False]


def test_an_artifact_of_another_graph_is_not_taken_for_this_ones(finished, tmp_path):
    """As after a training with other settings into the same run directory, before anything was built again."""
    copy = tmp_path / "run"
    shutil.copytree(finished[0], copy)
    recipe = Artifact.load(copy / "artifacts" / "cpu-openvino" / "fp32").recipe
    settings = Settings(AccuracyPlan(), MeasurePlan(), LimitsPlan(), Budget(), seed=0, build=False)
    with Store(copy) as store:
        graph = write_graph(copy / "trained-again")
        bench = Workbench(store, graph.path.parent, Evidence(copy / "graph" / "golden.npz"), None, settings, Quiet(), graph)
        profile = find_profile("cpu-openvino")
        with pytest.raises(IntegrityError, match="was built from another graph than trained-again") as caught:
            bench.build(profile, recipe, diagnosis.probe(profile))
    assert "quantize" in caught.value.action


def test_a_target_that_fails_on_the_test_images_alone_is_told_and_ends_nothing(finished, tmp_path, monkeypatch):
    copy = tmp_path / "run"
    shutil.copytree(finished[0], copy)
    verify = Workbench.verify

    def failing(self, profile, artifact, split):
        if split == "test" and profile.name == "cpu-openvino":
            raise ChildError("took longer than 1 s", "raise limits.run_seconds")
        return verify(self, profile, artifact, split)

    monkeypatch.setattr(Workbench, "verify", failing)
    with reopened(copy, Quiet(), stored=True) as run:
        tuner = run.tuner(build=False)
        rows = {row.target: row for profile in run.profiles for row in tuner.tune(profile) if row.chosen}
    assert rows["cpu-openvino"].reason.endswith("; test images: took longer than 1 s")
    assert rows["cpu-openvino"].top1 is None
    assert rows["cpu-onnxruntime"].top1 > 0


def test_a_copied_run_is_verified_without_its_data(finished, tmp_path):
    copy = tmp_path / "moved here"
    shutil.copytree(finished[0], copy)
    done = fofa_deploy("verify", copy, "--profile", "cpu-onnxruntime", "--json")
    assert done.returncode == 0, done.stderr
    assert all(row["status"] == "verified" for row in json.loads(done.stdout))


def test_other_preprocessing_makes_new_expectations(finished, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(finished[0], copy)
    sets = [part for text in (*SMALL, "data.mean=[0.1]") for part in ("--set", text)]
    done = fofa_deploy("export", "demo", "--out", copy, "--force", "--quiet", *sets)
    assert done.returncode == 0, done.stderr
    before, after = ({m.stage: m.key for m in manifests(folder)} for folder in (finished[0], copy))
    assert before["graph"] != after["graph"]


def test_stages_one_by_one_end_in_a_report(tmp_path):
    """The README's walk, on a small scale; what a stage noticed is told by all verbs that go by it."""
    out, noticed = tmp_path / "run", "distill.dkd_beta"
    changes = (*SMALL, "targets=['cpu-onnxruntime']", "required=[]", f"{noticed}=4.0")
    sets = [part for text in changes for part in ("--set", text)]
    for arguments in (
        ("distill", "demo", "--out", out, *sets),
        ("export", "demo", "--out", out, *sets),
        ("quantize", out),
        ("report", out),
    ):
        done = fofa_deploy(*arguments, "--quiet")
        assert done.returncode == 0, (arguments, done.stderr)
        assert arguments[0] == "report" or f"notice: without effect: {noticed}" in done.stderr, arguments
    report = read_report(out / "report.json")
    assert report.targets
    assert any(notice.startswith(f"without effect: {noticed}") for notice in report.notices)


@pytest.mark.parametrize("verb", ["quantize", "verify", "profile"])
def test_verbs_work_on_a_finished_run(finished, verb):
    command = [
        sys.executable,
        "-m",
        "fofa_deploy",
        verb,
        str(finished[0]),
        "--profile",
        "cpu-onnxruntime",
        "--recipe",
        "fp32",
        "--json",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [row["recipe"] for row in found] == ["fp32"]
    assert found[0]["status"] == "verified"


@pytest.mark.parametrize("verb", ["quantize", "profile"])
def test_verbs_take_a_ready_made_onnx_file(finished, tmp_path, verb):
    images = photographs(tmp_path)
    file = tmp_path / "mine.onnx"
    file.write_bytes((finished[0] / "graph" / "model.onnx").read_bytes())
    command = [
        sys.executable,
        "-m",
        "fofa_deploy",
        verb,
        str(file),
        "--profile",
        "cpu-onnxruntime",
        "--images",
        str(images),
        "--json",
    ]
    done = subprocess.run([*command, "--recipe", "fp32"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout)
    assert row["golden"]["relative_error"] < 1e-4
    assert row["validation"]["samples"] == len(list(images.rglob("*.png"))) // 5, "every fifth image judges, none is left out"


def test_export_takes_a_ready_made_checkpoint(finished, tmp_path):
    images = photographs(tmp_path)
    arguments = "student.arguments={patch_size=4,embed_dim=32,depth=2,num_heads=2}"
    weights = str(finished[0] / "student" / "weights.safetensors")
    model = ["--model", "timm:vit_tiny_patch16_224", "--classes", "10", "--images", images, "--out", tmp_path / "run"]
    size = ["--set", "data.image_size=16", "--set", "data.channels=1", "--set", arguments]
    done = fofa_deploy("export", weights, *model, *size)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).is_file()
    done = fofa_deploy("quantize", tmp_path / "run", "--recipe", "qat-int8", "--quiet")
    assert done.returncode == 3, "nothing could be tried"
    assert "notice: no quantization-aware training: images without labels train nothing" in done.stderr


def test_sigkill_while_distilling_and_the_same_command_finishes(tmp_path):
    out = tmp_path / "run"
    sets = [part for text in (*SMALL, "distill.epochs=3", "distill.checkpoint_seconds=0.01") for part in ("--set", text)]
    command = [sys.executable, "-m", "fofa_deploy", "distill", "demo", "--out", str(out), "--quiet", *sets]
    child = subprocess.Popen(command)
    deadline = time.monotonic() + 240
    while not list(out.glob(".scratch/student-*/checkpoints/*.pt")) and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(child.pid, signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert not (out / "student").exists()
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (out / "student" / "weights.safetensors").is_file()


# --- a back end from another distribution ---------------------------------------------------------------------

BACKEND = '''
from fofa_exporters.reference import FP32, ReferenceBackend, ReferenceSession


class MadeUpBackend:
    """Shares nothing with the core but the seam; its kernels are borrowed from the numpy evaluator."""

    name = "made-up"
    precisions = ReferenceBackend.precisions

    def probe(self, profile):
        return ReferenceBackend().probe(profile)

    def recipes(self, profile, graph):
        return [FP32.model_copy(update={"name": "fp32-made-up"})]

    def build(self, graph, recipe, calibration, out):
        artifact = ReferenceBackend().build(graph, recipe, calibration, out)
        renamed = artifact.model_copy(update={"backend": self.name})
        (out / "artifact.json").write_text(renamed.model_dump_json(indent=1))
        return renamed

    def load(self, artifact, profile):
        return ReferenceBackend().load(artifact, profile)
'''

PROFILE = """
name = "made-up-board"
description = "A device that nobody has"
runtime = "made-up"
precisions = ["fp32"]
"""


@pytest.fixture
def elsewhere(tmp_path):
    """A distribution of its own, installed by lying on the path, and its hardware profile."""
    folder = tmp_path / "site"
    metadata = folder / "made_up-1.0.dist-info"
    metadata.mkdir(parents=True)
    (folder / "made_up.py").write_text(BACKEND)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: made-up\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[fofa_deploy.backends]\nmade-up = made_up:MadeUpBackend\n")
    profile = tmp_path / "made-up-board.toml"
    profile.write_text(textwrap.dedent(PROFILE))
    return {**os.environ, "PYTHONPATH": str(folder)}, profile


def test_a_fourth_back_end_runs_through_the_pipeline(finished, elsewhere):
    environment, profile = elsewhere
    unbuilt = fofa_deploy("profile", finished[0], "--profile", profile, "--json", env=environment)
    assert unbuilt.returncode == 1
    assert "fofa-deploy quantize builds it" in json.loads(unbuilt.stdout)[0]["reason"]
    built = fofa_deploy("quantize", finished[0], "--profile", profile, "--json", env=environment)
    assert built.returncode == 0, built.stderr
    done = fofa_deploy("profile", finished[0], "--profile", profile, "--json", env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [(row["recipe"], row["status"], row["chosen"]) for row in found] == [("fp32-made-up", "verified", True)]


def test_a_fourth_back_end_runs_through_the_contract_suite(elsewhere):
    suite = Path(__file__).parent / "exporters" / "test_contract.py"
    command = [sys.executable, "-m", "pytest", str(suite), "-q", "-k", "made-up", "-p", "no:cacheprovider"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=elsewhere[0], cwd=suite.parents[2])
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout
    assert " failed" not in done.stdout


def test_every_verb_is_a_module():
    for name in cli.list_commands(None):
        assert cli.get_command(None, name).name == name
