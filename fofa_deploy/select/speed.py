"""What candidates take on a target, measured: each is built by the first recipe of every family, and timed beside the others.

Recipes of a family have one latency (`fofa_deploy.tune.search`). Those that are dear to build are left to candidates
that do not fit by others of their precision. What the latency aid knows is neither built nor timed again, unless it was too slow.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from fofa_deploy import diagnosis
from fofa_deploy.backend import get_backend
from fofa_deploy.errors import BackendError, FofaError, StageError, UnavailableError, UserError
from fofa_deploy.measure import Candidate, patient
from fofa_deploy.results import Measurement
from fofa_deploy.select.choose import Speed, misses
from fofa_deploy.select.clocks import Clock, clock_for
from fofa_deploy.select.table import Figures, LatencyTable, Setting
from fofa_deploy.store import digest
from fofa_deploy.tune.workbench import Workbench
from fofa_deploy.types import Artifact, Budget, HardwareProfile, Probe, Recipe, digest_file

GROUP = 8
"""Artifacts that are loaded at a time, the common reference among them."""

TIMES = ("p50_ms", "p90_ms", "throughput_sps")
"""Figures that other work on the machine moves."""

AGAIN = "run the same command again: what has been timed is not timed again"


@dataclass(frozen=True)
class Speeds:
    """Those that ran, in the recipe that counts; and why a recipe or a whole candidate could not be built or run."""

    found: tuple[Speed, ...]
    recipes: dict[str, str]
    reasons: dict[str, dict[str, str]]


@dataclass(frozen=True)
class _Entry:
    name: str
    recipe: Recipe
    setting: Setting


class Stopwatch:
    """The candidates of one target. Each has a workbench, and so a folder, of its own.

    Args:
        clock: of the device; default: the one that the profile names, else this machine's.

    Raises:
        FofaError: neither this machine nor the device that the profile names can run the target.
    """

    def __init__(
        self, benches: Mapping[str, Workbench], profile: HardwareProfile, table: LatencyTable, clock: Clock | None = None
    ) -> None:
        self._benches, self._profile, self._table = benches, profile, table
        self._backend = get_backend(profile.runtime)
        self._probe: Probe = diagnosis.probe(profile)
        self._clock = clock or clock_for(profile, self._probe)
        self._reasons: dict[str, dict[str, str]] = {name: {} for name in benches}
        self._timed: set[Setting] = set()

    @property
    def fingerprint(self) -> str:
        """Of the device that is timed on."""
        return self._clock.fingerprint

    def speeds(self, fits: Callable[[Speed], bool] = lambda _: True) -> Speeds:
        """By the recipes that are cheap to build; the dear ones are built of those alone that do not fit by the cheap ones."""
        entries = [entry for name, bench in self._benches.items() for entry in self._entries(name, bench)]
        cheap = [entry for entry in entries if not _spared(entry, entries)]
        self._ensure(cheap)
        kept = {name for name, (_, figures) in self._best(cheap, fits).items() if fits(_speed(name, figures))}
        late = [entry for entry in entries if entry not in cheap and entry.name not in kept]
        self._ensure(late)
        best = self._best([*cheap, *late], fits)
        found = tuple(_speed(name, figures) for name, (_, figures) in best.items())
        return Speeds(found, {name: recipe for name, (recipe, _) in best.items()}, self._reasons)

    def _ensure(self, entries: Sequence[_Entry]) -> None:
        """Have the aid know everybody that runs."""
        fresh = [entry for entry in entries if not self._known(entry)]
        self._time([(entry, artifact) for entry in fresh if (artifact := self._built(entry))])

    def _known(self, entry: _Entry) -> bool:
        """By the aid. What misses a limit on time is believed where it was timed just now: a machine is not always as busy."""
        figures = self._table.find(entry.setting)
        if figures is None or entry.setting in self._timed:
            return figures is not None
        return not any(miss.figure in TIMES for miss in misses(_speed(entry.name, figures), self._limits))

    @property
    def _limits(self) -> list[Budget]:
        return [self._profile.budget, *(bench.settings.budget for bench in self._benches.values())]

    def _best(self, entries: Sequence[_Entry], fits: Callable[[Speed], bool]) -> dict[str, tuple[str, Figures]]:
        """Of each candidate the fastest recipe that the aid knows and that fits, or the fastest if none does; and its figures."""
        found: dict[str, list[tuple[str, Figures]]] = {}
        for entry in entries:
            if figures := self._table.find(entry.setting):
                found.setdefault(entry.name, []).append((entry.recipe.name, figures))
        return {
            name: min(recipes, key=lambda one: (not fits(_speed(name, one[1])), one[1].p50_ms)) for name, recipes in found.items()
        }

    def _entries(self, name: str, bench: Workbench) -> list[_Entry]:
        families: dict[str, Recipe] = {}
        try:
            recipes = self._backend.recipes(self._profile, bench.graph)
        except (StageError, UserError, UnavailableError) as error:
            self._reasons[name]["recipes"] = error.message
            return []
        for recipe in recipes:
            if not recipe.on_request:
                families.setdefault(recipe.kin, recipe)
        first = [recipe for recipe in families.values() if recipe.after not in families]
        return [_Entry(name, recipe, self._setting(bench, recipe)) for recipe in first]

    def _setting(self, bench: Workbench, recipe: Recipe) -> Setting:
        return Setting(
            fingerprint=self._clock.fingerprint,
            graph=digest_file(bench.graph.path),
            recipe=digest([recipe, self._probe.versions]),
            profile=digest(self._profile),
            batch=self._profile.execution.batch_sizes[0],
        )

    def _built(self, entry: _Entry) -> Artifact | None:
        bench = self._benches[entry.name]
        bench.progress.say(f"{self._profile.name}: build {entry.name} ({entry.recipe.name})")
        try:
            return bench.build(self._profile, entry.recipe, self._probe)
        except (StageError, UserError, UnavailableError) as error:
            self._reasons[entry.name][entry.recipe.name] = error.message
            return None

    def _time(self, built: Sequence[tuple[_Entry, Artifact]]) -> None:
        """In groups; the first artifact that runs is in every one, and the others' times are scaled to its first.

        Raises:
            BackendError: it stops running; what has been kept until then is scaled, and nothing else is kept.
        """
        reference: tuple[_Entry, Artifact] | None = None
        usual = 1.0
        for start in range(0, len(built), GROUP - 1):
            group = built[start : start + GROUP - 1]
            factor, found = self._scaled(reference, usual, group)
            for (entry, artifact), one in zip(group, found, strict=True):
                self._keep(entry, artifact, one, factor)
                if reference is None and isinstance(one, Measurement):
                    reference, usual = (entry, artifact), one.latency_ms.p50

    def _scaled(
        self, reference: tuple[_Entry, Artifact] | None, usual: float, group: Sequence[tuple[_Entry, Artifact]]
    ) -> tuple[float, list[Measurement | FofaError]]:
        """What a group took, and the factor from there to where the reference took what is usual."""
        if reference is None:
            return 1.0, self._measured(group)
        again, *found = self._measured([reference, *group])
        if isinstance(again, FofaError):
            problem = f"{self._profile.name}: {reference[0].name} ran before and does not now: {again.message}"
            raise BackendError(problem, AGAIN) from again
        return usual / again.latency_ms.p50, found

    def _measured(self, group: Sequence[tuple[_Entry, Artifact]]) -> list[Measurement | FofaError]:
        batch = self._profile.execution.batch_sizes[0]
        candidates = [
            Candidate(
                artifact=artifact.folder, profile=self._profile, golden=self._benches[entry.name].evidence.golden, batch=batch
            )
            for entry, artifact in group
        ]
        bench = self._benches[group[0][0].name]
        settings = replace(bench.settings, measure=patient(bench.settings.measure, *self._limits))
        return self._clock.times(candidates, settings, bench.progress)

    def _keep(self, entry: _Entry, artifact: Artifact, found: Measurement | FofaError, factor: float) -> None:
        if isinstance(found, FofaError):
            self._reasons[entry.name][entry.recipe.name] = found.message
            return
        p90 = found.latency_ms.p90
        figures = Figures(
            p50_ms=factor * found.latency_ms.p50,
            p90_ms=None if p90 is None else factor * p90,
            throughput_sps=found.throughput_sps / factor,
            size_bytes=artifact.size_bytes,
            peak_rss_bytes=found.peak_rss_bytes,
        )
        self._table.keep(entry.setting, figures)
        self._timed.add(entry.setting)


def _spared(entry: _Entry, entries: Sequence[_Entry]) -> bool:
    """Whether a cheaper recipe of the same precision may tell what the candidate takes."""
    others = [other.recipe for other in entries if other.name == entry.name and not other.recipe.dear]
    return entry.recipe.dear and any(other.precision is entry.recipe.precision for other in others)


def _speed(name: str, figures: Figures) -> Speed:
    return Speed(name=name, **figures.model_dump(exclude={"measured_at"}))
