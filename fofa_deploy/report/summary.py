"""What a report says before it shows its tables: the outcome per target, and the sentences made of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from fofa_deploy.report import words
from fofa_deploy.results import Environment, Measurement, RunReport, TargetRow
from fofa_deploy.types import Status

# Without a chosen recipe a target ended the way its most hopeful recipe did.
HOPE = (Status.VERIFIED, Status.BUILT_NOT_RUN, Status.REJECTED, Status.FAILED, Status.SKIPPED)


@dataclass(frozen=True)
class Target:
    """All recipes of one target, in the order in which they were tried."""

    name: str
    rows: tuple[TargetRow, ...]

    @property
    def chosen(self) -> TargetRow | None:
        return next((row for row in self.rows if row.chosen), None)

    @property
    def speaker(self) -> TargetRow:
        """The row whose status and reason stand for the target."""
        return self.chosen or min(self.rows, key=lambda row: HOPE.index(row.status))


def targets_of(report: RunReport) -> tuple[Target, ...]:
    """The rows grouped by target; no target is left out, whatever became of it."""
    names = dict.fromkeys(row.target for row in report.targets)
    return tuple(Target(name, tuple(row for row in report.targets if row.target == name)) for name in names)


def most_sensitive(report: RunReport) -> list[tuple[str, float, float]]:
    """(layer, squared error of the logits, share of all layers' errors), the worst first."""
    total = sum(report.sensitivity.values())
    return [(name, error, error / total if total else 0.0) for name, error in report.sensitivity.items()][:TOP]


def verified_rows(report: RunReport) -> list[TargetRow]:
    """The chosen recipes that were run and kept."""
    return [t.chosen for t in targets_of(report) if t.chosen and t.chosen.status is Status.VERIFIED]


def headline(report: RunReport) -> str:
    """How many targets are verified, and what is left of the rest."""
    targets = targets_of(report)
    done = len(verified_rows(report))
    if not targets:
        return "No target was asked for."
    if done == len(targets):
        return "The only target is verified." if done == 1 else f"All {done} targets are verified."
    return f"{done} of {len(targets)} targets verified." if done else "No target is verified."


def lead(report: RunReport) -> str:
    """The fastest verified artifact against the reference, in one sentence; empty when nothing is verified."""
    rows = verified_rows(report)
    if not rows:
        return ""
    # Factors are all against the one reference, so they compare across devices where milliseconds do not.
    row = max(rows, key=lambda row: (row.speedup or 0.0, -(row.latency_ms.p50 if row.latency_ms else 0.0)))
    parts = [
        *_accuracy_clause(row, report.reference),
        *_latency_clause(row, report.reference),
        *_size_clause(row, report.reference),
    ]
    return f"{report.student.model} as {row.recipe} on {row.target} {_listed(parts)}." if parts else ""


def reference_name(report: RunReport) -> str:
    """What the artifacts are compared with, by its own description."""
    row = report.reference
    return "" if row is None else row.description or f"{row.recipe} on {row.runtime}"


def _accuracy_clause(row: TargetRow, reference: TargetRow | None) -> Iterator[str]:
    if row.top1 is not None:
        against = f" (reference: {words.percent(reference.top1)})" if reference and reference.top1 is not None else ""
        yield f"gets {words.percent(row.top1)} of the test images right{against}"


def _latency_clause(row: TargetRow, reference: TargetRow | None) -> Iterator[str]:
    """Without a factor the two were not measured together, and the reference's milliseconds are no comparison."""
    if row.latency_ms:
        against = ""
        if row.speedup is not None and reference and reference.latency_ms:
            beside = words.milliseconds(row.speedup * row.latency_ms.p50)  # in this target's race, not in the first one's
            against = f" (reference: {beside} ms; {words.factor(row.speedup)} as fast)"
        yield f"answers in {words.milliseconds(row.latency_ms.p50)} ms{against}"


def _size_clause(row: TargetRow, reference: TargetRow | None) -> Iterator[str]:
    if row.size_bytes is not None:
        against = f" (reference: {words.size(reference.size_bytes)})" if reference and reference.size_bytes is not None else ""
        yield f"takes {words.size(row.size_bytes)}{against}"


def _listed(parts: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(parts[:-1]), parts[-1]]))


def difference(value: float | None, other: float | None) -> float | None:
    """``value - other`` where both are known."""
    return None if value is None or other is None else value - other


def shrinkage(row: TargetRow, reference: TargetRow | None) -> float | None:
    """How many times smaller than the reference."""
    if reference is None or not reference.size_bytes or not row.size_bytes:
        return None
    return reference.size_bytes / row.size_bytes


def conditions(row: TargetRow) -> str:
    """What a latency means nothing without, on one line."""
    if row.measurement is None:
        return "conditions of measurement not recorded" if row.latency_ms else ""
    return " · ".join(_conditions(row, row.measurement))


def _conditions(row: TargetRow, measured: Measurement) -> Iterator[str]:
    yield measured.device
    yield _load(measured)
    yield f"{words.count(measured.warmup_runs)} warm-up + {words.count(measured.runs)} runs"
    yield f"variation {words.percent(measured.variation)}"
    if row.environment:
        yield f"{row.environment.machine}: {_runtime_version(row.runtime, row.environment)}"
    yield f"artifact {measured.artifact_sha256[:12]}"
    yield words.moment(measured.measured_at)


def _load(measured: Measurement) -> str:
    return f"{measured.threads} thread{'s' if measured.threads > 1 else ''}, batch {measured.batch}"


def _runtime_version(runtime: str, environment: Environment) -> str:
    plain = {name.replace("_", "-").casefold(): version for name, version in environment.versions.items()}
    version = plain.get(runtime.replace("_", "-").casefold())
    return f"{runtime} {version}" if version else words.pairs(environment.versions)


def further(row: TargetRow) -> str:
    """The numbers that are worth having and are not what the choice was made by, on one line."""
    return " · ".join(_further(row))


def _further(row: TargetRow) -> Iterator[str]:
    if row.top1 is not None:
        yield f"test top-1 {words.percent(row.top1)}, top-5 {words.percent(row.top5)}"
    if row.golden and row.golden.cosine is not None:
        yield f"golden cosine {row.golden.cosine:.5f}"
    if row.throughput_sps is not None:
        yield f"{row.throughput_sps:,.0f} images/s"
    if row.peak_rss_bytes is not None:
        yield f"peak memory {words.size(row.peak_rss_bytes)}"
    if row.cold_start_ms is not None:
        yield f"cold start {words.milliseconds(row.cold_start_ms)} ms"
    for other in row.other_batches:
        yield f"{_load(other)}: p50 {words.milliseconds(other.latency_ms.p50)} ms, {other.throughput_sps:,.0f} images/s"
    yield from _energy(row.measurement)


def _energy(measured: Measurement | None) -> Iterator[str]:
    if measured and measured.energy_mj is not None:
        yield f"{measured.energy_mj:.3g} mJ per run"
    elif measured and measured.energy_reason:
        yield f"energy: {measured.energy_reason}"


TOP = 10
"""Layers shown; report.json keeps all."""


def profiled(report: RunReport) -> list[TargetRow]:
    """The chosen rows whose runtime told what each layer takes."""
    return [target.chosen for target in targets_of(report) if target.chosen and target.chosen.layers]


def fleet(report: RunReport) -> dict[str, list[TargetRow]]:
    """Artifacts that were measured in more than one place, by recipe and digest: the only ones that compare devices."""
    groups: dict[str, list[TargetRow]] = {}
    for row in report.targets:
        if row.measurement:
            groups.setdefault(f"{row.recipe} {row.measurement.artifact_sha256[:8]}", []).append(row)
    return {name: rows for name, rows in groups.items() if len({row.target for row in rows}) > 1}


def limit_words(row: TargetRow) -> str:
    """How near an artifact comes to what the machine can do."""
    if row.of_limit is None or row.peaks is None:
        return "how near it comes to this machine's limits is not known"
    peaks = ", ".join(f"{name} {value:,.0f}" for name, value in row.peaks.gops.items())
    return (
        f"runs at {words.percent(row.of_limit)} of what this machine can do "
        f"(measured with {row.peaks.threads} threads: {peaks} · 10⁹ operations/s, {row.peaks.gbps:.1f} GB/s; "
        f"{words.moment(row.peaks.measured_at)}{', on a busy machine and so too low' if row.peaks.busy else ''})"
    )


def environments(report: RunReport) -> list[tuple[str, Environment]]:
    """Every distinct environment with what was done there."""
    places: dict[str, tuple[list[str], Environment]] = {report.environment.fingerprint: (["this run"], report.environment)}
    for row in report.targets:
        if row.environment:
            names, _ = places.setdefault(row.environment.fingerprint, ([], row.environment))
            names.append(row.target)
    return [(", ".join(dict.fromkeys(names)), environment) for names, environment in places.values()]
