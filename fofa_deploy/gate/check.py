"""Candidate x baseline -> report: both are run again, here and now, side by side; a stored figure decides nothing."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property, partial
from pathlib import Path

import numpy as np

from fofa_deploy import __version__, environment
from fofa_deploy.config import AccuracyPlan, GatePlan, LimitsPlan
from fofa_deploy.errors import DataError, StageError, UnavailableError, UserError
from fofa_deploy.gate import rules, statistics
from fofa_deploy.gate.answers import AnswerRequest, Answers
from fofa_deploy.gate.baseline import Kept
from fofa_deploy.gate.launches import BASELINE, CANDIDATE, TWIN, race
from fofa_deploy.gate.rules import Noise, Paired, Series
from fofa_deploy.gate.sources import Images, Pair, Source, Subject, open_source, pair_up
from fofa_deploy.gate.statistics import Shift
from fofa_deploy.gate.verdicts import Figures, Finding, GateReport, Verdict, overall
from fofa_deploy.isolate import run_isolated
from fofa_deploy.progress import Progress
from fofa_deploy.results import Environment
from fofa_deploy.types import Budget

QUICK_LAUNCHES = 5
COMMITS = ("GITHUB_SHA", "CI_COMMIT_SHA")
"""Variables in which CI tells the commit, GitHub and GitLab."""


@dataclass(frozen=True)
class Options:
    """How to check. ``profile`` is for bare artifact folders; ``gate`` stands in for the plan's table."""

    quick: bool = False
    trend: bool = False
    timed: bool = False
    """Time the candidate even where nothing has to be judged by it: for a new baseline."""
    profile: str | None = None
    gate: GatePlan | None = None
    trusted: bool = False
    """Open engines of baselines, bundles and artifact folders: they are machine code."""


def check(
    candidate: Path, baseline: Path | None, progress: Progress, options: Options | None = None
) -> tuple[GateReport, dict[str, Kept]]:
    """Judge a candidate: by its budgets, and against a baseline where there is one.

    Returns:
        The report, and per target the files that a new baseline keeps.

    Raises:
        UserError: a side is not what it should be, or holds files that are not the recorded ones.
        UnavailableError: the baseline belongs to another device or other tools, and ``options.trend`` is not set.
    """
    options = options or Options()
    opened = partial(open_source, profile=options.profile, trusted=options.trusted)
    return Check(opened(candidate), opened(baseline) if baseline else None, progress, options).run()


@dataclass
class _Target:
    """What is known of a target so far."""

    pair: Pair
    own: Answers | None = None
    paired: Paired | None = None
    series: Series = field(default_factory=Series)
    latency: Finding | None = None
    budget: Finding | None = None
    throughput: Finding | None = None
    broken: StageError | None = None

    @cached_property
    def away(self) -> str:
        """Why this machine is not the target; empty where it may be."""
        return environment.mismatch(self.pair.profile)

    @property
    def undecided(self) -> bool:
        return any(finding and _open(finding) for finding in (self.latency, self.budget, self.throughput))


class Check:
    """One check, from two opened sources to its report."""

    def __init__(self, candidate: Source, baseline: Source | None, progress: Progress, options: Options) -> None:
        self._started, self._here = time.monotonic(), environment.describe()
        self._sources, self._progress, self._options = (candidate, baseline), progress, options
        if not candidate.subjects and not candidate.unmet:
            action = "finish the run, on a machine that runs its targets"
            raise UserError(f"{candidate.path} has no artifact that could be judged", action)
        plan = candidate.plan or (baseline.plan if baseline else None)
        self._gate = options.gate or (plan.gate if plan else GatePlan())
        self._limits = plan.limits if plan else LimitsPlan()
        self._accuracy = plan.accuracy if plan else AccuracyPlan()
        self._budget = plan.budget if plan else Budget()
        self._notices = [*self._foreign(baseline), *(f"{name}: not judged: {why}" for name, why in candidate.untried.items())]
        pairs, self._missing = pair_up(candidate, baseline)
        self._targets = [_Target(pair) for pair in pairs]
        alone = [pair.target for pair in pairs if baseline and pair.baseline is None]
        self._notices += [f"{target}: the baseline has no such target; judged by its budgets alone" for target in alone]

    def _foreign(self, baseline: Source | None) -> Iterator[str]:
        """Refuse a baseline of another device or other tools, or say that it makes a trend."""
        if baseline is None or baseline.environment is None or baseline.environment.fingerprint == self._here.fingerprint:
            return
        problem = (
            f"{baseline.path} was made on another device or with other tools ({_differences(baseline.environment, self._here)})"
        )
        if not self._options.trend:
            action = "make the baseline here, from the base commit, in the same job; or --trend to look without judging latency"
            raise UnavailableError(problem, action)
        yield problem

    def run(self) -> tuple[GateReport, dict[str, Kept]]:
        for target in self._targets:
            with _breaking(target):
                self._answer(target)
        self._race()
        unmet, untried = self._sources[0].unmet, self._sources[0].untried
        whys = {**dict.fromkeys(self._missing, "see the candidate's report"), **untried, **unmet}
        findings = [
            *(_missing(name, whys[name]) for name in sorted({*self._missing, *unmet})),
            *(finding for target in self._targets for finding in self._judge(target)),
        ]
        if self._options.trend:
            findings = [_as_trend(finding) for finding in findings]
        candidate, baseline = self._sources
        report = GateReport(
            verdict=overall(findings),
            candidate=str(candidate.path),
            baseline=str(baseline.path) if baseline else None,
            trend=self._options.trend,
            findings=tuple(findings),
            figures={target.pair.target: _figures(target) for target in self._targets},
            notices=tuple(self._notices),
            launches={target.pair.target: len(target.series.launches) for target in self._targets},
            seconds=round(time.monotonic() - self._started, 3),
            created_at=datetime.now(UTC).isoformat(timespec="seconds"),
            tool_version=__version__,
            commit=next((os.environ[name] for name in COMMITS if os.environ.get(name)), None),
            environment=self._here,
        )
        kept = [target for target in self._targets if not target.broken and not target.away]
        held = {t.pair.target: t.pair.candidate.kept(t.pair.golden, t.own.classes if t.own else None, candidate) for t in kept}
        return report, held

    # --- accuracy -------------------------------------------------------------------------------------------------

    def _answer(self, target: _Target) -> None:
        """Both sides' answers, image by image; the same artifact answers once."""
        pair = target.pair
        if target.away:
            return
        if pair.candidate.images is None:
            if pair.candidate.said:
                target.own = Answers(classes=pair.candidate.said.classes)
            return
        self._progress.say(f"{pair.target}: run on {len(pair.candidate.images.truth):,} images")
        target.own = self._answers(pair, pair.candidate, pair.candidate.images)
        if pair.baseline is not None and (pair.baseline.images or pair.baseline.said):
            other = self._others_answers(pair, pair.baseline, target.own)
            target.paired = _paired(pair, other, target.own)

    def _others_answers(self, pair: Pair, baseline: Subject, own: Answers) -> Answers:
        if baseline.said:
            return Answers(classes=baseline.said.classes)
        assert baseline.images
        same_images = pair.candidate.images and baseline.images.folder == pair.candidate.images.folder
        return own if pair.same and same_images else self._answers(pair, baseline, baseline.images)

    def _answers(self, pair: Pair, subject: Subject, images: Images) -> Answers:
        request = AnswerRequest(artifact=subject.artifact.folder, profile=pair.profile, images=images.folder / "images.npy")
        limits = self._limits
        child = "fofa_deploy.gate.answers:answer"
        return run_isolated(child, request, Answers, seconds=limits.run_seconds, memory_bytes=limits.memory_bytes)

    # --- latency --------------------------------------------------------------------------------------------------

    def _race(self) -> None:
        """Two looks at most, by rule: what the first leaves open gets as many launches again, and that is the end."""
        asked = QUICK_LAUNCHES if self._options.quick else self._gate.launches
        tests = [t.paired for t in self._targets if t.paired and t.paired.testable]
        racing = [target for target in self._targets if self._timed(target) and not target.broken and not target.away]
        launches = statistics.launches_for(asked, len(tests) + len(racing))
        for error in statistics.LOOKS:
            for target in racing:
                with _breaking(target):
                    self._launch(target, launches)
            racing = [target for target in racing if not target.broken]
            self._judge_races(racing, error)
            racing = [target for target in racing if target.undecided]
            if not racing:
                return

    def _timed(self, target: _Target) -> bool:
        """Whether a race can tell anything: not between an artifact and itself, unless its own figures are wanted."""
        pair = target.pair
        different = pair.baseline is not None and not pair.same
        wanted = self._p90_limits(pair) or self._throughput_limits(pair)
        return different or bool(wanted) or self._options.timed or self._wants_memory(pair)

    def _wants_memory(self, pair: Pair) -> bool:
        return any(budget.peak_rss_bytes is not None for budget in (self._budget, pair.profile.budget))

    def _p90_limits(self, pair: Pair) -> list[float]:
        return [budget.p90_ms for budget in (self._budget, pair.profile.budget) if budget.p90_ms is not None]

    def _throughput_limits(self, pair: Pair) -> list[float]:
        return [budget.throughput_sps for budget in (self._budget, pair.profile.budget) if budget.throughput_sps is not None]

    def _launch(self, target: _Target, launches: int) -> None:
        pair, done = target.pair, len(target.series.launches)
        other = pair.baseline.runnable(pair.profile, pair.baseline_golden) if pair.baseline and not pair.same else None
        own = pair.candidate.runnable(pair.profile, pair.golden)
        with self._progress.task(f"{pair.target}: launches", launches) as task:
            for launch in race(other, own, range(done, done + launches), self._limits):
                target.series.launches.append(launch)
                task.advance(1)

    def _judge_races(self, racing: Sequence[_Target], error: float) -> None:
        """Judge those that race now; the family is every test of the check, those decided before included."""
        duels = self._duels()
        slower, faster = self._adjusted(duels)
        for target in racing:
            name = target.pair.target
            if name in duels and _open(target.latency):
                noise = Noise.of(target.series, self._gate.margin)
                key = (name, "latency")
                target.latency = rules.judge_latency(name, duels[name], noise, slower[key], faster[key], error, self._gate)
            if (limits := self._p90_limits(target.pair)) and _open(target.budget):
                target.budget = rules.judge_p90_budget(name, target.series, min(limits))
            if (least := self._throughput_limits(target.pair)) and _open(target.throughput):
                batch = target.pair.profile.execution.batch_sizes[0]
                target.throughput = rules.judge_throughput_budget(name, target.series, batch, max(least))

    def _duels(self) -> dict[str, Shift]:
        """Every race against a baseline so far, by target."""
        complete = [target for target in self._targets if target.series.launches and not target.broken]
        raced = [target for target in complete if BASELINE in target.series.launches[0].blocks]
        return {target.pair.target: statistics.shift(target.series.logs(BASELINE, CANDIDATE)) for target in raced}

    def _adjusted(self, duels: Mapping[str, Shift]) -> tuple[dict[tuple[str, str], float], ...]:
        """p-values of worse and of better, adjusted over all targets and metrics."""
        tested = {t.pair.target: t.paired for t in self._targets if t.paired and t.paired.testable}
        worse = {(name, "latency"): found.p_slower for name, found in duels.items()}
        better = {(name, "latency"): found.p_faster for name, found in duels.items()}
        worse |= {(name, "accuracy"): found.p_worse for name, found in tested.items()}
        better |= {(name, "accuracy"): found.p_better for name, found in tested.items()}
        return statistics.holm(worse), statistics.holm(better)

    # --- judging --------------------------------------------------------------------------------------------------

    def _judge(self, target: _Target) -> Iterator[Finding]:
        pair, figures = target.pair, _figures(target)
        if target.broken:
            reason = target.broken.message.splitlines()[0]
            yield Finding(target=pair.target, metric="run", verdict=Verdict.FAIL, reason=reason)
            return
        if target.away:
            how = f", with --profile of a profile named {pair.target} without a host" if pair.profile.device.host else ""
            reason = f"{target.away}: check it there{how}"
            yield Finding(target=pair.target, metric="device", verdict=Verdict.INCONCLUSIVE, reason=reason)
        else:
            yield from self._judge_accuracy(target, figures.accuracy)
            yield from self._judge_latency(target)
        for budget in (self._budget, pair.profile.budget):
            if budget.size_bytes is not None:
                yield rules.at_most(pair.target, "size budget", figures.size_bytes, budget.size_bytes, "bytes")
            if budget.peak_rss_bytes is not None and not target.away:
                yield rules.at_most(pair.target, "memory budget", figures.peak_rss_bytes, budget.peak_rss_bytes, "bytes")
        if pair.baseline is not None and self._gate.max_size_increase is not None:
            before = pair.baseline.artifact.size_bytes
            yield rules.judge_growth(pair.target, "size", before, figures.size_bytes, self._gate.max_size_increase)
        if target.latency is not None and self._gate.max_memory_increase is not None:
            peak = target.series.peak_rss_bytes(BASELINE)
            yield rules.judge_growth(pair.target, "memory", peak, figures.peak_rss_bytes, self._gate.max_memory_increase)

    def _judge_accuracy(self, target: _Target, accuracy: float | None) -> Iterator[Finding]:
        pair, images = target.pair, target.pair.candidate.images
        name = "top-1" if images is None or images.labelled else "agreement"
        if accuracy is not None and images is not None:
            pytorch = float(np.mean(images.pytorch == images.truth)) if images.labelled else None
            yield from rules.judge_own_accuracy(pair.target, accuracy, pytorch, self._accuracy)
        if target.paired is not None:
            worse, better = (p.get((pair.target, "accuracy"), 1.0) for p in self._adjusted(self._duels()))
            yield rules.judge_accuracy(pair.target, name, target.paired, worse, better, self._gate.accuracy_margin)
        elif pair.same:
            reason = "the same artifact: as accurate by definition, not run again"
            yield Finding(target=pair.target, metric=name, verdict=Verdict.PASS, reason=reason)
        elif pair.baseline is not None and (pair.baseline.images or pair.baseline.said):
            reason = "the candidate brings no images to answer: give its run directory"
            yield Finding(target=pair.target, metric=name, verdict=Verdict.FAIL, reason=reason)

    def _judge_latency(self, target: _Target) -> Iterator[Finding]:
        name, series = target.pair.target, target.series
        if target.pair.same:
            reason = "the same artifact on the same device: equal by definition, not raced"
            yield Finding(target=name, metric="latency", verdict=Verdict.PASS, reason=reason, unit="ms", ratio=1.0)
        if target.latency is not None:
            medians = {
                key: float(np.median(series.pooled(rival))) for key, rival in (("baseline", BASELINE), ("candidate", CANDIDATE))
            }
            yield target.latency.model_copy(update=medians)
            yield Noise.of(series, self._gate.margin).finding(name, self._gate.margin)
            for quantile in rules.TAILS:
                tail = rules.judge_tail(name, series, quantile, self._gate.tail_margin)
                if tail is None:
                    self._notices.append(f"{name}: too few runs to judge p{round(100 * quantile)}")
                else:
                    yield tail
        yield from filter(None, (target.budget, target.throughput))


@contextmanager
def _breaking(target: _Target) -> Iterator[None]:
    """A target that crashes or hangs fails, and the others go on."""
    try:
        yield
    except StageError as error:
        target.broken = error


def _open(finding: Finding | None) -> bool:
    """What a look has decided, the next one does not look at again."""
    return finding is None or finding.verdict is Verdict.INCONCLUSIVE


def _missing(target: str, why: str) -> Finding:
    return Finding(target=target, metric="artifact", verdict=Verdict.FAIL, reason=f"no verified artifact for this target: {why}")


def _as_trend(finding: Finding) -> Finding:
    """Across devices or tools latency is shown and not judged."""
    judged = finding.metric not in ("latency", "p90", "p99", "self-check")
    if judged or finding.verdict in (Verdict.PASS, Verdict.IMPROVED):
        return finding
    return finding.model_copy(update={"verdict": Verdict.PASS, "reason": f"trend, not judged: {finding.reason}"})


def _differences(before: Environment, after: Environment) -> str:
    """What the fingerprints are made of, as far as it differs."""
    fields = [name for name in ("machine", "cpu", "cores", "features") if getattr(before, name) != getattr(after, name)]
    told = [f"{name} {getattr(before, name)} -> {getattr(after, name)}" for name in fields]
    names = sorted({*before.versions, *after.versions})
    changed = [name for name in names if before.versions.get(name) != after.versions.get(name)]
    told += [f"{name} {before.versions.get(name, 'none')} -> {after.versions.get(name, 'none')}" for name in changed]
    return ", ".join(told) or "another fingerprint"


def _paired(pair: Pair, baseline: Answers, candidate: Answers) -> Paired:
    """Right or wrong, image by image.

    Raises:
        DataError: the two sides answered different images.
    """
    images, other = pair.candidate.images, pair.baseline
    assert images
    assert other
    truth = images.truth
    theirs = other.images.digest if other.images else other.said and other.said.truth
    if theirs != images.digest or not len(truth) == len(baseline.classes) == len(candidate.classes):
        problem = f"{pair.target}: candidate and baseline were not run on the same images"
        raise DataError(problem, "make both from the same data, seed and verify.samples, or write the baseline again")
    reference = truth if images.labelled else other.model_says
    if reference is None or len(reference) != len(truth):
        action = "write the baseline again with --update-baseline, or compare with its run directory"
        raise DataError(f"{pair.target}: the baseline does not say what its answers are right by", action)
    return Paired(np.asarray(baseline.classes) == reference, np.asarray(candidate.classes) == truth)


def _figures(target: _Target) -> Figures:
    pair, series = target.pair, target.series
    artifact, images = pair.candidate.artifact, pair.candidate.images
    accuracy = float(np.mean(np.asarray(target.own.classes) == images.truth)) if target.own and images else None
    times = series.pooled(CANDIDATE) if series.launches else None
    peak = series.peak_rss_bytes(CANDIDATE, TWIN)
    p50, p90, p99 = (None if times is None else float(np.quantile(times, q)) for q in (0.5, 0.9, 0.99))
    return Figures(
        recipe=artifact.recipe.name,
        sha256=artifact.sha256,
        size_bytes=artifact.size_bytes,
        peak_rss_bytes=None if peak is None else int(peak),
        p50_ms=p50,
        p90_ms=p90,
        p99_ms=p99,
        accuracy=accuracy,
    )
