"""What building, verifying and timing found, as rows of the report."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from fofa_deploy.errors import FofaError
from fofa_deploy.results import Environment, Measurement, TargetRow
from fofa_deploy.types import Artifact, HardwareProfile, Recipe, Status
from fofa_deploy.verify import Verification


def row_of(profile: HardwareProfile, recipe: Recipe | None, status: Status, reason: str) -> TargetRow:
    """How a recipe ended; without one, how the target did."""
    return TargetRow(
        target=profile.name,
        runtime=profile.runtime,
        profile=profile.name,
        recipe=recipe.name if recipe else "none",
        description=recipe.description if recipe else "",
        status=status,
        reason=reason,
    )


def with_artifact(row: TargetRow, artifact: Artifact, found: Verification | None, root: Path) -> TargetRow:
    """The row with what was built for it, and how near that comes to PyTorch."""
    return row.model_copy(
        update={
            "precision": dict(Counter(layer.precision for layer in artifact.layers if layer.weighted)),
            "layer_types": dict(Counter(f"{layer.operator} {layer.precision}" for layer in artifact.layers)),
            "golden": found.golden if found else None,
            "validation": found.whole if found else None,
            "size_bytes": artifact.size_bytes,
            "artifact": artifact.folder.relative_to(root).as_posix(),
            "sha256": artifact.sha256,
        }
    )


def timings(found: Measurement, where: Environment) -> dict[str, object]:
    """A measurement as the fields of a row."""
    return {
        "measurement": found,
        "latency_ms": found.latency_ms,
        "throughput_sps": found.throughput_sps,
        "peak_rss_bytes": found.peak_rss_bytes,
        "cold_start_ms": found.cold_start_ms,
        "environment": where,
    }


def with_threads(profile: HardwareProfile, threads: int | None) -> HardwareProfile:
    if threads is None:
        return profile
    return profile.model_copy(update={"execution": profile.execution.model_copy(update={"threads": threads})})


def p50(row: TargetRow) -> float:
    assert row.latency_ms
    return row.latency_ms.p50


def first_line(error: FofaError) -> str:
    return error.message.splitlines()[0]
