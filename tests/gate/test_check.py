"""The gate as a user meets it: a real run, a slower one, a less accurate one, one with nothing changed; baselines, trends."""

from __future__ import annotations

import gc
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest
from tiny import build, run_cli, write_graph

from fofa_deploy.config import load_plan
from fofa_deploy.errors import DataError, IntegrityError, UnavailableError, UserError
from fofa_deploy.gate import rules
from fofa_deploy.gate.answers import Answers
from fofa_deploy.gate.baseline import Said
from fofa_deploy.gate.check import Options, _paired, check
from fofa_deploy.gate.launches import race
from fofa_deploy.gate.sources import Images, Subject, open_source
from fofa_deploy.gate.verdicts import Finding, GateReport, Verdict
from fofa_deploy.isolate import Child
from fofa_deploy.pipeline import compress_and_export
from fofa_deploy.progress import Quiet
from fofa_deploy.types import Artifact

from .conftest import PROFILE, chosen, edited, lose_target, slow_down, spoil_preprocessing


def found(report: GateReport, metric: str):
    (finding,) = (finding for finding in report.findings if finding.metric == metric)
    return finding


def run_check(*arguments: object):
    done = run_cli("check", *arguments, "--quick", "--json", "--quiet")
    assert done.stdout, done.stderr
    return done, GateReport.model_validate_json(done.stdout)


def test_nothing_changed_passes(baseline_run, copy):
    done, report = run_check(copy, "--baseline", baseline_run)
    assert done.returncode == 0, done.stdout + done.stderr
    assert report.verdict is Verdict.PASS
    assert "equal by definition" in found(report, "latency").reason
    assert found(report, "top-1").reason.startswith("0 of ")
    assert done.stderr.startswith("gate: pass (")


def test_a_slower_recipe_fails_by_latency_and_by_nothing_that_did_not_change(baseline_run, copy, tmp_path):
    slow_down(copy)
    junit, summary = tmp_path / "junit.xml", tmp_path / "summary.md"
    done, report = run_check(copy, "--baseline", baseline_run, "--junit", junit, "--markdown", summary)
    assert done.returncode == 1, done.stdout + done.stderr
    latency = found(report, "latency")
    assert latency.verdict is Verdict.FAIL
    assert latency.ratio > 1.5
    assert latency.p_value < 0.035
    assert found(report, "top-1").verdict is Verdict.PASS
    assert "latency: slower" in done.stderr
    cases = {case.get("name"): case for case in ElementTree.parse(junit).iter("testcase")}
    assert cases["latency"].find("failure").get("message") == latency.reason
    assert cases["top-1"].find("failure") is None
    assert "❌ | one-thread | latency" in summary.read_text()


def test_wrong_preprocessing_fails_by_accuracy_although_the_file_is_the_same(baseline_run, copy):
    before = Artifact.load(chosen(copy)).sha256
    spoil_preprocessing(copy)
    assert Artifact.load(chosen(copy)).sha256 == before
    report, _ = check(copy, baseline_run, Quiet(), Options(quick=True))
    assert report.verdict is Verdict.FAIL
    accuracy = found(report, "top-1")
    assert accuracy.verdict is Verdict.FAIL
    assert accuracy.candidate < accuracy.baseline - 0.02
    assert accuracy.p_value < 0.035
    assert found(report, "top-1 against PyTorch").verdict is Verdict.FAIL


def test_an_artifact_that_takes_pixels_is_held_to_one_of_normalized_images(baseline_run, copy):
    """Each side is fed in its own form, of the same images."""
    plan = load_plan(str(copy / "plan.json"), ["export.input=uint8-nhwc"])
    compress_and_export(plan, copy, Quiet(), force=True)
    assert Artifact.load(chosen(copy)).sidecar.input.dtype == "uint8"
    report, _ = check(copy, baseline_run, Quiet(), Options(quick=True))
    assert found(report, "top-1").reason.startswith("0 of ")
    assert found(report, "latency").ratio > 0.0


def test_budgets_hold_without_any_baseline(copy):
    plan = json.loads((copy / "plan.json").read_text())
    plan["budget"] = {"p90_ms": 1e-4, "size_bytes": 10**9, "peak_rss_bytes": 10**6, "throughput_sps": 1e9}
    (copy / "plan.json").write_text(json.dumps(plan))
    done, report = run_check(copy)
    assert done.returncode == 1
    verdicts = {finding.metric: finding.verdict for finding in report.findings}
    assert verdicts.pop("top-1 against PyTorch") is Verdict.PASS
    assert verdicts.pop("throughput budget") is Verdict.FAIL
    assert verdicts == {"p90 budget": Verdict.FAIL, "size budget": Verdict.PASS, "memory budget": Verdict.FAIL}


def test_without_budgets_a_run_alone_is_held_to_pytorch(baseline_run):
    report, _ = check(baseline_run, None, Quiet())
    assert {finding.metric for finding in report.findings} == {"top-1 against PyTorch"}
    assert (report.verdict, sum(report.launches.values())) == (Verdict.PASS, 0)


def test_a_baseline_is_written_once_and_judges_later_runs(copy, baseline_run, tmp_path):
    history, plot, kept = tmp_path / "history.jsonl", tmp_path / "trend.svg", tmp_path / "base"
    done, report = run_check(baseline_run, "--update-baseline", kept, "--history", history, "--plot", plot)
    assert done.returncode == 0, done.stderr
    text = (kept / "baseline.json").read_text()
    assert len(text) < 6000, "small enough to review"
    assert json.loads(text)["targets"]["one-thread"]["figures"]["sha256"] == Artifact.load(chosen(baseline_run)).sha256
    assert report.figures["one-thread"].p50_ms > 0
    moved = Path(shutil.move(kept, tmp_path / "moved"))
    done, report = run_check(copy, "--baseline", moved)
    assert done.returncode == 0, done.stderr
    assert found(report, "top-1").reason == "0 of 359 images lost, 0 won"
    assert [json.loads(line)["verdict"] for line in history.read_text().splitlines()] == ["pass"]
    assert "<svg " in plot.read_text()
    assert "one-thread" in plot.read_text()


@pytest.fixture
def foreign(baseline_run, tmp_path) -> Path:
    """The run, as another machine would have recorded it."""
    run = Path(shutil.copytree(baseline_run, tmp_path / "foreign"))
    with edited(run) as (report, row):
        for environment in (report["environment"], row["environment"]):
            environment |= {"fingerprint": "0" * 64, "cpu": "Another CPU"}
            environment["versions"]["onnxruntime"] = "1.0"
    return run


def test_another_device_or_tool_is_refused_and_named(baseline_run, foreign):
    with pytest.raises(UnavailableError, match=r"cpu Another CPU -> .*, onnxruntime 1\.0 -> ") as caught:
        check(baseline_run, foreign, Quiet())
    assert "--trend" in caught.value.action


def test_a_trend_fails_on_accuracy_and_never_on_latency(foreign, copy):
    slow_down(copy)
    spoil_preprocessing(copy)
    report, _ = check(copy, foreign, Quiet(), Options(quick=True, trend=True))
    latency = found(report, "latency")
    assert latency.verdict is Verdict.PASS
    assert latency.reason.startswith("trend, not judged: slower: ")
    assert found(report, "top-1").verdict is Verdict.FAIL
    assert report.trend
    assert any("another device" in notice for notice in report.notices)


def test_a_target_that_the_candidate_lost_is_a_failure(baseline_run, copy):
    lose_target(copy)
    judged, _ = check(copy, baseline_run, Quiet())
    assert judged.exit_code == 1
    assert "no verified artifact" in found(judged, "artifact").reason


def test_a_candidate_that_dies_fails_with_its_reason(baseline_run, copy, monkeypatch):
    monkeypatch.setattr("fofa_deploy.gate.check.race", _dying)
    slow_down(copy)
    report, kept = check(copy, baseline_run, Quiet(), Options(quick=True))
    assert report.exit_code == 1
    assert "SIGKILL" in found(report, "run").reason
    assert kept == {}


def _dying(*arguments):
    """The real launches; the first child is killed before it races."""
    launches = race(*arguments)
    kill = Child.call

    def call(self, method, **named):
        self._process.kill()
        return kill(self, method, **named)

    Child.call = call
    try:
        yield from launches
    finally:
        Child.call = kill


def test_a_target_without_a_baseline_is_judged_alone_and_said_so(baseline_run, copy):
    report = json.loads((copy / "report.json").read_text())
    report["targets"] = []
    (copy / "report.json").write_text(json.dumps(report))
    judged, _ = check(baseline_run, copy, Quiet())
    assert judged.verdict is Verdict.PASS
    assert any("no such target" in notice for notice in judged.notices)


def test_other_images_are_not_compared(baseline_run, copy):
    labels = copy / "data" / "test" / "labels.npy"
    content = bytearray(labels.read_bytes())
    content[-8] ^= 1
    labels.write_bytes(content)
    with pytest.raises(DataError, match="not run on the same images"):
        check(copy, baseline_run, Quiet())


def test_artifact_folders_of_two_runs_are_compared_with_their_runs_images(baseline_run, copy):
    report, _ = check(chosen(copy), chosen(baseline_run), Quiet())
    assert report.verdict is Verdict.PASS
    assert found(report, "top-1").baseline > 0.6


def test_bare_artifacts_need_a_profile_and_inputs(tmp_path):
    folder = build(write_graph(tmp_path / "graph"), "cpu-onnxruntime", tmp_path / "bare")
    with pytest.raises(DataError, match="which device") as caught:
        check(folder, None, Quiet())
    assert "--profile" in caught.value.action
    with pytest.raises(DataError, match="nothing to run"):
        check(folder, None, Quiet(), Options(profile="cpu-onnxruntime"))


def test_a_bundle_is_a_side_like_any_other_and_leaves_nothing(baseline_run, tmp_path, monkeypatch):
    packed, unpacked = tmp_path / "packed.zip", tmp_path / "unpacked"
    unpacked.mkdir()
    done = run_cli("bundle", baseline_run, "--recipe", chosen(baseline_run).name, "--out", packed)
    assert done.returncode == 0, done.stderr
    monkeypatch.setattr("tempfile.tempdir", str(unpacked))
    report = check(packed, baseline_run, Quiet())[0]  # what a baseline would keep holds the folder
    assert report.verdict is Verdict.PASS
    assert found(report, "top-1").candidate == found(report, "top-1").baseline
    gc.collect()
    assert list(unpacked.iterdir()) == []


def test_a_bundle_becomes_a_baseline(baseline_run, tmp_path):
    packed, base = tmp_path / "packed.zip", tmp_path / "base"
    done = run_cli("bundle", baseline_run, "--recipe", chosen(baseline_run).name, "--out", packed)
    assert done.returncode == 0, done.stderr
    profile = baseline_run.parent / "one-thread.toml"
    done = run_cli("check", packed, "--profile", profile, "--update-baseline", base, "--quick", "--quiet")
    assert done.returncode == 0, done.stderr
    assert open_source(base).subjects.keys() == {"one-thread"}


def test_a_plan_somewhere_above_makes_no_run_of_a_bundle_or_an_artifact(baseline_run, tmp_path, monkeypatch):
    """What is no part of a run is not trusted as one, nor judged by its limits."""
    packed, unpacked = tmp_path / "packed.zip", tmp_path / "a" / "b"
    done = run_cli("bundle", baseline_run, "--recipe", chosen(baseline_run).name, "--out", packed)
    assert done.returncode == 0, done.stderr
    unpacked.mkdir(parents=True)
    for folder in (tmp_path, tmp_path / "a", unpacked):
        (folder / "plan.json").write_text("{}")
    monkeypatch.setattr("tempfile.tempdir", str(unpacked))
    bare = shutil.copytree(chosen(baseline_run), unpacked / "bare")
    for path in (packed, bare):
        source = open_source(path, str(baseline_run.parent / "one-thread.toml"))
        assert (source.plan, source.subjects.keys()) == (None, {"one-thread"})
    assert open_source(chosen(baseline_run)).plan is not None


def test_without_labels_each_side_is_right_by_its_own_model(tmp_path):
    """A student that was trained anew agrees with itself better than the one before it does with it."""
    said, logits = np.arange(10) % 3, tmp_path / "logits.npy"
    np.save(tmp_path / "images.npy", np.zeros((10, 1, 2, 2), np.uint8))
    np.save(logits, np.eye(3, dtype=np.float32)[said])
    images = Images(tmp_path, logits, labelled=False)
    before = tuple(int(value) for value in (said + 1) % 3)

    def paired(reference):
        baseline = Subject("cpu", None, None, None, said=Said(before, images.digest, reference))
        pair = SimpleNamespace(target="cpu", candidate=SimpleNamespace(images=images), baseline=baseline)
        return _paired(pair, Answers(classes=before), Answers(classes=tuple(said.tolist())))

    found = paired(before)
    assert (found.baseline.all(), found.candidate.all()) == (True, True)
    with pytest.raises(DataError, match="does not say what its answers are right by"):
        paired(None)


def test_a_device_elsewhere_says_nothing_of_where_the_others_were_measured(baseline_run, copy, tmp_path):
    board = tmp_path / "board.toml"
    board.write_text(PROFILE.replace("one-thread", "board") + '\n[device]\nname = "cpu"\nhost = "board"\n')
    for run in (copy, Path(shutil.copytree(baseline_run, tmp_path / "base"))):
        plan = json.loads((run / "plan.json").read_text())
        (run / "plan.json").write_text(json.dumps(plan | {"targets": [str(board), *plan["targets"]]}))
        with edited(run) as (report, row):
            there = row["environment"] | {"cpu": "Cortex-A76", "fingerprint": "of another machine"}
            report["targets"].insert(0, row | {"target": "board", "environment": there})
    judged, _ = check(copy, tmp_path / "base", Quiet(), Options(quick=True))
    assert judged.verdict is Verdict.INCONCLUSIVE, judged.findings
    verdicts = {(finding.target, finding.metric): finding.verdict for finding in judged.findings}
    assert verdicts["one-thread", "latency"] is Verdict.PASS
    assert verdicts["board", "device"] is Verdict.INCONCLUSIVE


def test_what_is_no_bundle_is_told_and_leaves_nothing(baseline_run, tmp_path, monkeypatch):
    (tmp_path / "no.zip").write_bytes(b"PK\x03\x04 and no more")
    (tmp_path / "unpacked").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "unpacked"))
    with pytest.raises(DataError, match=r"no\.zip is no bundle"):
        check(tmp_path / "no.zip", baseline_run, Quiet())
    assert list((tmp_path / "unpacked").iterdir()) == []


@pytest.mark.parametrize("name", ["nothing", "empty"])
def test_what_is_no_side_is_told(tmp_path, name):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=name):
        check(tmp_path / name, None, Quiet())


def test_the_job_summary_is_appended_to(baseline_run, tmp_path, monkeypatch):
    summary = tmp_path / "summary.md"
    summary.write_text("before\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    assert run_check(baseline_run)[0].returncode == 0
    assert summary.read_text().startswith("before\n## ✅ fofa-deploy check: pass\n")


def test_a_plot_needs_a_history(baseline_run):
    done = run_cli("check", baseline_run, "--plot", "x.svg")
    assert done.returncode == 2
    assert "--history" in done.stderr


def test_a_file_that_cannot_be_written_hides_no_verdict_and_no_other_file(baseline_run, tmp_path, monkeypatch):
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path))
    done, judged = run_check(baseline_run, "--markdown", tmp_path / "report.md", "--history", tmp_path / "history.jsonl")
    assert (done.returncode, judged.verdict) == (2, "pass")
    assert f"{tmp_path} cannot be written" in done.stderr
    assert (tmp_path / "history.jsonl").is_file()
    told = (tmp_path / "report.md").read_text()
    assert f"{baseline_run.name} against its budgets" in told


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--history", "log.jsonl", "--plot", "plot.svg"], "log.jsonl, line 1, is no entry"),
        (["--junit", "log.jsonl/report.xml"], "report.xml cannot be written"),
    ],
)
def test_what_cannot_be_written_is_told_before_the_race(baseline_run, tmp_path, arguments, problem):
    (tmp_path / "log.jsonl").write_text("not a line of it\n")
    done = run_cli("check", baseline_run, *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert problem in done.stderr
    assert done.stdout == ""


# --- what must not pass unseen


def test_a_target_that_nothing_is_good_enough_for_fails_without_any_baseline(copy, tmp_path):
    lose_target(copy)
    judged, kept = check(copy, None, Quiet())
    assert (judged.exit_code, kept) == (1, {})
    assert found(judged, "artifact").reason.endswith(": it broke")
    done = run_cli("check", copy, "--update-baseline", tmp_path / "base", "--quiet")
    assert done.returncode == 1, "a failure is one, whatever became of the files"
    assert "no target has an artifact to keep" in done.stderr
    assert "it broke" in done.stdout, "the findings that the message names"
    assert not (tmp_path / "base").exists()


def test_a_run_without_anything_to_judge_is_refused(copy):
    report = json.loads((copy / "report.json").read_text())
    report["targets"] = []
    (copy / "report.json").write_text(json.dumps(report))
    with pytest.raises(UserError, match="no artifact that could be judged"):
        check(copy, None, Quiet())


def test_what_was_measured_elsewhere_leaves_the_plans_targets_to_be_checked(baseline_run, copy):
    with edited(copy) as (report, row):
        report["targets"].append(row | {"target": "one-thread on pi@camera"})
    judged, _ = check(copy, baseline_run, Quiet())
    assert {finding.target for finding in judged.findings} == {"one-thread"}
    assert judged.verdict is Verdict.PASS


@pytest.mark.parametrize("trend", [False, True])
def test_a_target_on_another_machine_has_its_size_judged_by_this_one(copy, tmp_path, trend):
    text = on_a_board(copy, tmp_path, "p90_ms = 1000.0\npeak_rss_bytes = 1000000000000\nsize_bytes = 1000000000").read_text()
    judged, kept = check(copy, None, Quiet(), Options(trend=trend))
    assert [finding.metric for finding in judged.findings] == ["device", "size budget"]
    assert found(judged, "device").reason.startswith("the device is board, not this machine: check it there, with --profile")
    assert (judged.exit_code, kept) == (4, {})
    on_a_board(copy, tmp_path, "size_bytes = 1")
    assert check(copy, None, Quiet(), Options(trend=trend))[0].exit_code == 1
    here = tmp_path / "there.toml"
    here.write_text(text.replace('host = "board"', ""))
    assert check(copy, None, Quiet(), Options(profile=str(here), quick=True))[0].exit_code == 0, "that very machine"


def on_a_board(run: Path, folder: Path, budget: str) -> Path:
    """The run's target becomes one of a device elsewhere."""
    board = folder / "board.toml"
    board.write_text(PROFILE + f'\n[device]\nname = "cpu"\nhost = "board"\n\n[budget]\n{budget}\n')
    plan = json.loads((run / "plan.json").read_text())
    (run / "plan.json").write_text(json.dumps(plan | {"targets": [str(board)]}))
    return board


@pytest.mark.parametrize(
    ("others", "verdict"),
    [
        ([("failed", "is_tensor() failed"), ("built-not-run", "no CUDA device")], Verdict.PASS),
        ([("skipped", "tensorrt does not import")], Verdict.PASS),
        ([], Verdict.PASS),
        ([("rejected", "too far off"), ("built-not-run", "no CUDA device")], Verdict.FAIL),
        ([("failed", "is_tensor() failed"), ("skipped", "this CPU does not compute in bf16")], Verdict.FAIL),
    ],
)
def test_what_a_missing_device_has_yet_to_run_is_a_notice_and_what_it_refused_a_failure(copy, tmp_path, others, verdict):
    (tmp_path / "rtx.toml").write_text(PROFILE.replace("one-thread", "rtx"))
    plan = json.loads((copy / "plan.json").read_text())
    (copy / "plan.json").write_text(json.dumps(plan | {"targets": [*plan["targets"], str(tmp_path / "rtx.toml")]}))
    with edited(copy) as (report, row):
        left = {"target": "rtx", "chosen": False, "latency_ms": None, "measurement": None, "artifact": None, "sha256": None}
        report["targets"] += [row | left | {"recipe": f"r{n}", "status": s, "reason": why} for n, (s, why) in enumerate(others)]
    judged, _ = check(copy, None, Quiet())
    assert judged.verdict is verdict
    if verdict is Verdict.PASS:
        assert any(notice.startswith("rtx: not judged: ") for notice in judged.notices)
    else:
        assert others[0][1] in found(judged, "artifact").reason


def test_what_lies_there_of_another_size_is_not_judged(copy):
    shutil.copytree(copy / "data", copy / "data-16")
    (copy / "data-16" / "test" / "labels.npy").write_bytes(b"of another run")
    assert found(check(copy, None, Quiet())[0], "top-1 against PyTorch").verdict is Verdict.PASS


def test_a_student_of_its_own_size_is_held_to_images_of_that_size(baseline_run, tmp_path):
    plan = load_plan(str(baseline_run.parent / "plan.toml"), ["student.image_size=20", "distill.epochs=1"])
    compress_and_export(plan, tmp_path / "run", Quiet())
    judged, _ = check(tmp_path / "run", None, Quiet())
    assert found(judged, "top-1 against PyTorch").verdict is Verdict.PASS
    paired, _ = check(tmp_path / "run", baseline_run, Quiet(), Options(quick=True))
    assert found(paired, "top-1").verdict is Verdict.FAIL, "the same images at another size, after a sixth of the training"


def test_images_with_the_same_labels_are_not_the_same_images(baseline_run, copy):
    (copy / "data" / "test" / "origin.txt").write_text("others")
    with pytest.raises(DataError, match="not run on the same images"):
        check(copy, baseline_run, Quiet())


def test_images_without_labels_are_the_same_at_any_size(tmp_path):
    def images(side, origin, labelled):
        folder = tmp_path / f"{side}-{origin}"
        folder.mkdir(exist_ok=True)
        np.save(folder / "images.npy", np.zeros((2, 1, side, side), np.uint8))
        np.save(folder / "labels.npy", np.arange(2))
        (folder / "origin.txt").write_text(origin)
        return Images(folder, folder / "logits.npy", labelled).digest

    for labelled in (True, False):
        assert images(8, "a", labelled) == images(12, "a", labelled) != images(8, "b", labelled)


def test_a_baseline_is_as_good_as_itself(baseline_run, tmp_path):
    assert run_check(baseline_run, "--update-baseline", tmp_path / "base")[0].returncode == 0
    options = Options(profile=str(baseline_run.parent / "one-thread.toml"))
    judged, _ = check(tmp_path / "base", tmp_path / "base", Quiet(), options)
    assert judged.verdict is Verdict.PASS
    assert "as accurate by definition" in found(judged, "top-1").reason
    with pytest.raises(DataError, match="which device") as caught:
        check(tmp_path / "base", tmp_path / "base", Quiet(), Options(profile="cpu-onnxruntime"))
    assert "one-thread" in caught.value.action


def test_what_the_first_look_decides_the_second_leaves(baseline_run, copy, monkeypatch):
    """Another figure's second look brings more launches, which would be a second chance."""
    plan = json.loads((copy / "plan.json").read_text())
    (copy / "plan.json").write_text(json.dumps(plan | {"budget": {"p90_ms": 1.0}}))
    verdicts = iter([Verdict.FAIL, Verdict.PASS])

    def one_after_the_other(target, *rest):
        return Finding(target=target, metric="latency", verdict=next(verdicts), reason="")

    monkeypatch.setattr(rules, "judge_latency", one_after_the_other)
    monkeypatch.setattr(
        rules, "judge_p90_budget", lambda name, *rest: Finding(target=name, metric="p90", verdict=Verdict.INCONCLUSIVE, reason="")
    )
    slow_down(copy)
    judged, _ = check(copy, baseline_run, Quiet(), Options(quick=True))
    assert judged.launches["one-thread"] >= 2 * 5
    assert found(judged, "latency").verdict is Verdict.FAIL
    assert list(verdicts) == [Verdict.PASS]


def test_machine_code_that_no_run_brings_has_to_be_trusted_by_name(baseline_run, copy, monkeypatch):
    monkeypatch.setattr("fofa_exporters.onnxruntime.OnnxRuntimeBackend.native", True)
    with pytest.raises(IntegrityError, match="is machine code") as caught:
        check(_bare(copy), baseline_run, Quiet())
    assert "--trust-engine" in caught.value.action
    assert check(copy, baseline_run, Quiet())[0].verdict is Verdict.PASS, "a run is its user's own"
    assert check(_bare(copy), baseline_run, Quiet(), Options(trusted=True))[0].verdict is Verdict.PASS


def _bare(run: Path) -> Path:
    """The chosen artifact's folder outside of its run."""
    return Path(shutil.copytree(chosen(run), run.parent / "bare", dirs_exist_ok=True))
