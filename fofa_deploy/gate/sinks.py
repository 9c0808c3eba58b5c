"""Where CI looks: JUnit XML, Markdown for the job summary, JSON, and one line. Rendering changes no verdict."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

from fofa_deploy.errors import UserError
from fofa_deploy.gate.verdicts import Finding, GateReport, Verdict
from fofa_deploy.progress import one_line
from fofa_deploy.report import words
from fofa_deploy.store import write_atomic

SIGNS = {Verdict.PASS: "✅", Verdict.FAIL: "❌", Verdict.INCONCLUSIVE: "❔", Verdict.IMPROVED: "🚀"}
COLUMNS = ("", "target", "metric", "baseline", "candidate", "ratio", "why")


def junit(report: GateReport) -> str:
    """One test case per finding: a failure is a failure, what is inconclusive is skipped with its reason."""
    count = {verdict: sum(finding.verdict is verdict for finding in report.findings) for verdict in Verdict}
    totals = {"tests": len(report.findings), "failures": count[Verdict.FAIL], "errors": 0, "skipped": count[Verdict.INCONCLUSIVE]}
    attributes = {key: str(value) for key, value in {**totals, "time": report.seconds}.items()}
    root = ElementTree.Element("testsuites", {"name": "fofa-deploy check", **attributes})
    suite = ElementTree.SubElement(root, "testsuite", {"name": "gate", "timestamp": report.created_at, **attributes})
    for finding in report.findings:
        _case(suite, finding)
    ElementTree.indent(root)
    return f"<?xml version='1.0' encoding='utf-8'?>\n{ElementTree.tostring(root, encoding='unicode')}\n"


def _case(suite: ElementTree.Element, finding: Finding) -> None:
    # one_line also drops what XML 1.0 cannot hold.
    name, reason = one_line(finding.metric), one_line(finding.reason)
    case = ElementTree.SubElement(suite, "testcase", {"classname": one_line(finding.target), "name": name, "time": "0"})
    if finding.verdict is Verdict.FAIL:
        ElementTree.SubElement(case, "failure", {"message": reason, "type": "regression"}).text = reason
    elif finding.verdict is Verdict.INCONCLUSIVE:
        ElementTree.SubElement(case, "skipped", {"message": reason})
    else:
        ElementTree.SubElement(case, "system-out").text = f"{finding.verdict}: {reason}"


def markdown(report: GateReport) -> str:
    """A table of the findings, what is wrong first."""
    from fofa_deploy.report.render import markdown_value as safe

    order = (Verdict.FAIL, Verdict.INCONCLUSIVE, Verdict.IMPROVED, Verdict.PASS)
    lines = [f"## {SIGNS[report.verdict]} fofa-deploy check: {report.verdict}", ""]
    against = safe(report.baseline) if report.baseline else "its budgets"
    lines += [f"{safe(report.candidate)} against {against} on {safe(report.environment.cpu)}, {report.environment.cores} cores; "]
    lines[-1] += f"{sum(report.launches.values())} launches in {words.duration(report.seconds)}"
    lines += ["", "| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * len(COLUMNS)]
    for finding in sorted(report.findings, key=lambda f: order.index(f.verdict)):
        cells = [SIGNS[finding.verdict], *(str(safe(cell)) for cell in cells_of(finding))]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", *(f"- {safe(notice)}" for notice in report.notices)]
    return "\n".join(lines).rstrip() + "\n"


def cells_of(finding: Finding) -> list[str]:
    """Target, metric, baseline, candidate, ratio and reason as a reader sees them."""
    figures = [_figure(value, finding.unit) for value in (finding.baseline, finding.candidate)]
    ratio = words.ABSENT if finding.ratio is None else f"{finding.ratio:.3f}"
    return [finding.target, finding.metric, *figures, ratio, words.clipped(finding.reason)]


def _figure(value: float | None, unit: str) -> str:
    if value is None:
        return words.ABSENT
    shown = {"ms": f"{value:.3f} ms", "bytes": words.size(int(value)), "fraction": f"{value:.2%}"}
    return shown.get(unit, f"{value:.6g}")


def make_room(path: Path) -> None:
    """The folder for an output that comes later.

    Raises:
        UserError: it cannot be made.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}", "choose another path") from error


def write(path: Path, text: str) -> None:
    """Write one output whole.

    Raises:
        UserError: it cannot be written.
    """
    make_room(path)
    try:
        write_atomic(path, text.encode())
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}", "choose another path") from error


def append(path: Path, text: str) -> None:
    """Add to a job summary, which other steps write to as well.

    Raises:
        UserError: it cannot be written.
    """
    try:
        with path.open("a", encoding="utf-8") as stream:
            stream.write(text)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}", "check GITHUB_STEP_SUMMARY") from error
