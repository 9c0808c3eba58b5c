"""Outputs and history: names cannot become markup, numbers stay numbers, lines stay whole."""

import json
import multiprocessing
from datetime import UTC, datetime
from pathlib import Path
from xml.etree import ElementTree

import pytest

from fofa_deploy import environment
from fofa_deploy.errors import UserError
from fofa_deploy.gate import sinks
from fofa_deploy.gate.history import append_history, picture, read_history
from fofa_deploy.gate.verdicts import Figures, Finding, GateReport, Verdict, overall, summary
from fofa_deploy.report.record import to_json

NASTY = 'cpu <b>|\x00\n"&]]>'


def report(**changes) -> GateReport:
    findings = (
        Finding(
            target=NASTY, metric="latency", verdict=Verdict.FAIL, reason=f"slower {NASTY}", unit="ms", baseline=1.0, candidate=1.2
        ),
        Finding(target="cpu", metric="self-check", verdict=Verdict.INCONCLUSIVE, reason="too noisy", ratio=1.03),
        Finding(target="cpu", metric="size", verdict=Verdict.IMPROVED, reason="smaller", unit="bytes", baseline=2e6, candidate=1e6),
        Finding(target="cpu", metric="top-1", verdict=Verdict.PASS, reason="same", unit="fraction", baseline=0.9, candidate=0.9),
    )
    figures = Figures(
        recipe="fp32", sha256="0" * 64, size_bytes=1, peak_rss_bytes=None, p50_ms=1.2, p90_ms=1.3, p99_ms=None, accuracy=0.9
    )
    fields = {
        "verdict": overall(findings),
        "candidate": "run",
        "baseline": "base",
        "findings": findings,
        "figures": {"cpu": figures},
        "seconds": 2.0,
        "created_at": datetime.now(UTC).isoformat(),
        "tool_version": "0",
        "environment": environment.describe(),
    }
    return GateReport(**{**fields, **changes})


def test_junit_is_well_formed_and_counts():
    root = ElementTree.fromstring(sinks.junit(report()).encode())
    (suite,) = root
    assert {key: suite.get(key) for key in ("tests", "failures", "errors", "skipped")} == {
        "tests": "4",
        "failures": "1",
        "errors": "0",
        "skipped": "1",
    }
    kinds = {case.get("name"): case[0].tag for case in suite}
    assert kinds == {"latency": "failure", "self-check": "skipped", "size": "system-out", "top-1": "system-out"}
    assert suite[0].get("classname") == 'cpu <b>|  "&]]>'


def test_markdown_has_one_row_per_finding_what_is_wrong_first():
    lines = sinks.markdown(report(notices=("<script>",))).splitlines()
    rows = [line for line in lines if line.startswith("| ")][2:]
    assert [row.split(" |")[0] for row in rows] == ["| ❌", "| ❔", "| 🚀", "| ✅"]
    assert {row.replace(r"\|", "").count("|") for row in rows} == {len(sinks.COLUMNS) + 1}
    assert "<" not in "".join(lines)
    assert lines[0] == "## ❌ fofa-deploy check: fail"


def test_json_is_strict_and_versioned():
    text = to_json(report())
    assert json.loads(text)["schema_version"] == 1
    assert GateReport.model_validate_json(text) == report().model_copy(
        update={key: getattr(GateReport.model_validate_json(text), key) for key in ("created_at", "environment")}
    )
    with pytest.raises(ValueError, match="finite"):
        Finding(target="cpu", metric="m", verdict=Verdict.PASS, reason="", candidate=float("nan"))


def test_the_summary_is_one_line_and_says_why():
    told = summary(report(findings=report().findings[1:], verdict=Verdict.INCONCLUSIVE))
    assert told == "gate: inconclusive (1 pass, 1 inconclusive, 1 improved): cpu self-check: too noisy"


@pytest.mark.parametrize(("verdict", "code"), [("pass", 0), ("improved", 0), ("fail", 1), ("inconclusive", 4)])
def test_exit_codes(verdict, code):
    assert report(verdict=Verdict(verdict)).exit_code == code


def test_what_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        sinks.write(tmp_path / "file" / "below", "")
    with pytest.raises(UserError, match="cannot be written"):
        append_history(tmp_path / "file" / "below", report())
    with pytest.raises(UserError, match="GITHUB_STEP_SUMMARY"):
        sinks.append(tmp_path / "no" / "where", "")


def _append(path: Path) -> None:
    for _ in range(20):
        append_history(path, report())


def test_lines_of_jobs_that_append_at_once_stay_whole(tmp_path):
    path = tmp_path / "history.jsonl"
    jobs = [multiprocessing.get_context("fork").Process(target=_append, args=(path,)) for _ in range(3)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(60)
    assert [job.exitcode for job in jobs] == [0, 0, 0]
    assert len(read_history(path)) == 60


def test_a_torn_last_line_does_not_swallow_the_next(tmp_path):
    path = tmp_path / "history.jsonl"
    append_history(path, report())
    with path.open("a") as stream:
        stream.write('{"schema_version": 1, "cre')
    append_history(path, report())
    with pytest.raises(UserError, match=r"line 2, is no entry") as caught:
        read_history(path)
    assert caught.value.action == "remove the line"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], lines[2]]))
    assert len(read_history(path)) == 2


def test_the_picture_breaks_the_line_where_the_machine_changes(tmp_path):
    path = tmp_path / "history.jsonl"
    for fingerprint in ("a", "a", "b", "b", "b"):
        append_history(path, report(environment=environment.describe().model_copy(update={"fingerprint": fingerprint})))
    svg = picture(read_history(path))
    ElementTree.fromstring(svg)
    assert "median latency, ms" in svg
    lines = [line for line in svg.split("<path d=") if "stroke-width: 1.4" in line]
    assert len(lines) >= 4, "two runs of points in each of two panels"
    ElementTree.fromstring(picture([]))
