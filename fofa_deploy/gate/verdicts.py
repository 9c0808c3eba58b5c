"""What the gate finds out. Ratios are candidate over baseline; accuracies are fractions; times are milliseconds, sizes bytes."""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from typing import Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt

from fofa_deploy.progress import one_line
from fofa_deploy.results import Environment
from fofa_deploy.types import Frozen


class Verdict(StrEnum):
    PASS = "pass"
    FAIL = "fail"
    INCONCLUSIVE = "inconclusive"
    IMPROVED = "improved"


EXIT_CODES = {Verdict.PASS: 0, Verdict.IMPROVED: 0, Verdict.FAIL: 1, Verdict.INCONCLUSIVE: 4}


class Finding(Frozen):
    """One metric of one target, judged."""

    target: str
    metric: str
    verdict: Verdict
    reason: str
    unit: str = ""
    baseline: float | None = None
    candidate: float | None = None
    ratio: float | None = None
    lower: float | None = Field(default=None, description="bound of the ratio, or of the candidate's figure where it has a budget")
    upper: float | None = None
    limit: float | None = None
    p_value: float | None = Field(default=None, description="of a regression, adjusted for the whole family (Holm)")


class Figures(Frozen):
    """The candidate's own figures, as found here and now; they become the next baseline's."""

    recipe: str
    sha256: str
    size_bytes: NonNegativeInt
    peak_rss_bytes: NonNegativeInt | None
    p50_ms: NonNegativeFloat | None
    p90_ms: NonNegativeFloat | None
    p99_ms: NonNegativeFloat | None
    accuracy: NonNegativeFloat | None = Field(description="top-1; without labels the agreement with PyTorch")


class GateReport(Frozen):
    """The whole record of one check; every other output is rendered from it."""

    schema_version: Literal[1] = 1
    verdict: Verdict
    candidate: str
    baseline: str | None
    trend: bool = False
    findings: tuple[Finding, ...]
    figures: dict[str, Figures]
    notices: tuple[str, ...] = ()
    launches: dict[str, int] = Field(default={}, description="fresh processes per target")
    seconds: float
    created_at: str
    tool_version: str
    commit: str | None = Field(default=None, description="of the job, where CI tells it")
    environment: Environment

    @property
    def exit_code(self) -> int:
        return EXIT_CODES[self.verdict]


def overall(findings: Iterable[Finding]) -> Verdict:
    """A failure outweighs all; doubt outweighs what is good."""
    found = {finding.verdict for finding in findings}
    order = (Verdict.FAIL, Verdict.INCONCLUSIVE, Verdict.IMPROVED)
    return next((verdict for verdict in order if verdict in found), Verdict.PASS)


def summary(report: GateReport) -> str:
    """One line: the verdict, and what decided it."""
    counts = [(verdict, [f for f in report.findings if f.verdict is verdict]) for verdict in Verdict]
    told = ", ".join(f"{len(found)} {verdict}" for verdict, found in counts if found) or "nothing judged"
    deciding = [f for f in report.findings if f.verdict is report.verdict is not Verdict.PASS]
    why = one_line("; ".join(f"{f.target} {f.metric}: {f.reason}" for f in deciding[:3]))  # reasons come from reports
    return f"gate: {report.verdict} ({told}){f': {why}' if why else ''}"
