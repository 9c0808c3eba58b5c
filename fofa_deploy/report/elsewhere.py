"""Rows that devices elsewhere gave: a run that is finished anew cannot measure them again, and must not lose them."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from pathlib import Path

from fofa_deploy.errors import IntegrityError, UserError
from fofa_deploy.report.record import read_report
from fofa_deploy.results import TargetRow
from fofa_deploy.types import Artifact, digest_file


def joined(before: Sequence[TargetRow], rows: Sequence[TargetRow]) -> tuple[TargetRow, ...]:
    """Each row in the place of its last one; of several that were chosen on a target, one after the other, the fastest stays so."""
    new = {(row.target, row.recipe) for row in rows}
    everyone = [*(row for row in before if (row.target, row.recipe) not in new), *rows]
    return tuple(_one_chosen(row, everyone) if row.target in {target for target, _ in new} else row for row in everyone)


def _one_chosen(row: TargetRow, everyone: Sequence[TargetRow]) -> TargetRow:
    fastest = min((_p50(other) for other in everyone if other.chosen and other.target == row.target), default=0.0)
    return row.model_copy(update={"chosen": row.chosen and _p50(row) == fastest})


def _p50(row: TargetRow) -> float:
    return row.latency_ms.p50 if row.latency_ms else math.inf


def kept(root: Path, rows: Sequence[TargetRow], targets: Collection[str]) -> list[TargetRow]:
    """Of the report that is there, the rows from devices that are no targets of the run, as far as the artifacts are still those.

    An artifact that was built for a device alone is in no row of today: it counts while it is of the graph that is there.
    """
    try:
        before = read_report(root).targets
    except UserError:  # none yet, or another version's
        return []
    built = {(row.recipe, row.sha256) for row in rows}
    graphs = [digest_file(path) for path in root.glob("graph*/model.onnx")]
    others = [row for row in before if row.target not in targets and row.target != row.profile]  # which was a target once
    return [row for row in others if (row.recipe, row.sha256) in built or _graph_of(root, row) in graphs]


def _graph_of(root: Path, row: TargetRow) -> str | None:
    """Of the very artifact that was measured, where it is still there."""
    try:
        artifact = Artifact.load(root / row.artifact) if row.artifact else None
    except IntegrityError:
        return None
    return artifact.graph_sha256 if artifact and artifact.sha256 == row.sha256 else None
