"""The gate inside a project's own tests: the fixture ``fofa_gate``. Importing this imports no framework, and changes nothing.

def test_the_model_is_no_worse(fofa_gate):
    fofa_gate.check("runs/candidate", baseline="baseline")
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import pytest

if TYPE_CHECKING:
    from fofa_deploy.gate.verdicts import GateReport


@dataclass(frozen=True)
class Gate:
    """Bound to one test, whose JUnit record gets the summary as a property."""

    node: pytest.Item

    def check(
        self,
        candidate: str | Path,
        baseline: str | Path | None = None,
        *,
        quick: bool = False,
        trend: bool = False,
        profile: str | None = None,
        trust_engine: bool = False,
        inconclusive: Literal["skip", "fail"] = "skip",
    ) -> GateReport:
        """As ``fofa-deploy check``: fails the test on a regression.

        Args:
            inconclusive: what becomes of the test where the machine is too noisy to judge.

        Returns:
            The report of a check that passed.

        Raises:
            FofaError: a side could not be read or run.
        """
        from fofa_deploy.gate.check import Options, check
        from fofa_deploy.gate.verdicts import Verdict, summary
        from fofa_deploy.progress import Quiet

        settings = Options(quick=quick, trend=trend, profile=profile, trusted=trust_engine)
        report, _ = check(Path(candidate), None if baseline is None else Path(baseline), Quiet(), settings)
        told = summary(report)
        self.node.user_properties.append(("fofa_gate", told))
        if report.verdict is Verdict.FAIL or (report.verdict is Verdict.INCONCLUSIVE and inconclusive == "fail"):
            pytest.fail(told, pytrace=False)
        if report.verdict is Verdict.INCONCLUSIVE:
            pytest.skip(told)
        return report


@pytest.fixture
def fofa_gate(request: pytest.FixtureRequest) -> Gate:
    """Judge a candidate against a baseline; see docs/gate.md."""
    assert isinstance(request.node, pytest.Item)
    return Gate(request.node)
