"""Distillation methods compared: same students, schedules and augmentation, several seeds; of each training
of a comparison, test images are read once, at its end.

python benchmarks/distillation/run.py all             # what follows, for every regime: days
python benchmarks/distillation/run.py rate            # each student's learning rate, alone, on validation images
python benchmarks/distillation/run.py screen          # forms of feedback, on validation images
python benchmarks/distillation/run.py end             # how long features teach, on validation images
python benchmarks/distillation/run.py switch          # prompts made cheaper, on validation images
python benchmarks/distillation/run.py cells           # how finely regions are seen, on validation images
python benchmarks/distillation/run.py tune            # each method's setting, on validation images
python benchmarks/distillation/run.py retune          # the same with the teachers as they are now: would it be chosen again?
python benchmarks/distillation/run.py pace            # what an epoch takes, for equal compute; on a quiet machine
python benchmarks/distillation/run.py compare         # the table, on test images
python benchmarks/distillation/run.py report          # README.md and picture from what is recorded

Every training is a line of results.jsonl as soon as it is done and is never done twice: interrupt at will, run again.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path

import click

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
import report  # noqa: E402 - neighbours of this file, as are the models that plans name
import study  # noqa: E402
from evidence import paces  # noqa: E402

from fofa_deploy.data import Data, load_data  # noqa: E402
from fofa_deploy.distill.job import Taught, Workshop, read_curve, read_summary  # noqa: E402
from fofa_deploy.progress import Progress, Quiet, Terminal  # noqa: E402

RESULTS = HERE / "results.jsonl"
DATA_SEED, TEACHER_SEED, TUNING_SEED, SCREENING_SEED, ENDING_SEED, CELLS_SEED, SWITCH_SEED = 0, 0, 900, 800, 700, 600, 500
QUICK_EPOCHS, PACE_EPOCHS = 2, 4


@dataclass(frozen=True)
class Training:
    """One student to be trained; ``key`` is what makes it another one."""

    phase: str
    regime: study.Regime
    pair: study.Pair
    method: study.Method
    choice: int
    seed: int
    epochs: int
    rate: float | None = None
    """None: the method's own setting."""

    @property
    def settings(self) -> study.Settings:
        rate = {} if self.rate is None else {"lr": self.rate}
        return {**rate, **self.method.plan, **self.method.choices[self.choice]}

    @property
    def key(self) -> dict:
        return {
            "phase": self.phase,
            "regime": self.regime.name,
            "pair": self.pair.name,
            "method": self.method.name,
            "plan": self.settings,
            "seed": self.seed,
            "epochs": self.epochs,
        }


@dataclass(frozen=True)
class Room:
    """Where to work, and with how much."""

    root: str
    work: Path
    threads: int
    progress: Progress
    results: Path = RESULTS

    def workshop(self, limit: int | None, seed: int, final: bool) -> Workshop:
        """Without ``final`` the test images are out of reach."""
        data = _data(self.root, limit)
        return Workshop(data if final else dataclasses.replace(data, test=data.validation), seed, self.threads, self.progress)

    def teacher(self, kind: str, epochs: int) -> Path:
        """Fitted once for all who run this: a processor of another kind rounds otherwise, and would teach another student."""
        out = HERE / "teachers" / f"{kind}-{epochs}"
        if not (out / "summary.json").is_file():
            out.mkdir(parents=True, exist_ok=True)
            self.workshop(None, TEACHER_SEED, final=True).fit(study.teacher(kind, epochs), out)
            self._record({"phase": "teacher", "teacher": kind, "epochs": epochs, **_scores(out, final=True)})
        return out

    def _taught_by(self, training: Training) -> Taught:
        kind, epochs = training.pair.teacher, training.regime.teacher_epochs
        return study.teacher(kind, epochs), self.teacher(kind, epochs)

    def train(self, training: Training) -> None:
        final = training.phase == "compare"
        workshop = self.workshop(training.regime.limit, training.seed, final)
        plan = study.plan(training.settings, training.epochs)
        shelf = _shelf(self.work, training.key)
        taught_by = self._taught_by(training) if plan.terms else None
        workshop.distill(study.student(training.pair.student), plan, shelf, taught_by)
        self._record({**training.key, **_scores(shelf, final)})

    def _record(self, line: dict) -> None:
        with self.results.open("a") as file:  # one write of one line: two processes may share the file
            file.write(json.dumps(line, allow_nan=False) + "\n")


@cache
def _data(root: str, limit: int | None) -> Data:
    return load_data(study.data(root, limit), DATA_SEED)


def _shelf(work: Path, key: dict) -> Path:
    """A folder that only this training uses: an interrupted one goes on in it."""
    from fofa_deploy.store import digest

    folder = work / "students" / digest(key)[:16]
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _scores(out: Path, final: bool) -> dict:
    summary, curve = read_summary(out), read_curve(out)
    last = curve[-1]
    return {
        "validation": summary.top1_validation,
        "test": summary.top1 if final else None,
        "diagnostics": last.diagnostics,
        "losses": last.losses,
        "seconds": round(sum(epoch.seconds for epoch in curve), 1),
    }


def recorded(results: Path = RESULTS) -> list[dict]:
    return [json.loads(line) for line in results.read_text().splitlines()] if results.is_file() else []


def _is_done(training: Training, lines: list[dict]) -> bool:
    key = json.loads(json.dumps(training.key))
    return any(key.items() <= line.items() and not _to_repeat(line) for line in lines)


def _to_repeat(line: dict) -> bool:
    """Forms that had DIST muted are screened again; tuning has a phase of its own for that."""
    return line["phase"] == "screen" and line.get("dist_muted", False)


# --- phases ---------------------------------------------------------------------------------------------------


def rate(regime: study.Regime, seeds: int) -> Iterator[Training]:
    """Every learning rate, once per student, on half the schedule."""
    _refuse_settled(regime)
    for student in sorted({pair.student for pair in study.PAIRS}):
        pair = next(pair for pair in study.PAIRS if pair.student == student)
        for choice in range(len(study.RATES.choices)):
            yield Training("rate", regime, pair, study.RATES, choice, TUNING_SEED, max(1, regime.epochs[student] // 2))


def _refuse_settled(regime: study.Regime) -> None:
    if regime.settled:
        raise click.ClickException(f"regime {regime.name!r} takes the settings of {regime.settled!r}: run this phase for that one")


def screen(regime: study.Regime, seeds: int) -> Iterator[Training]:
    """Every form of feedback."""
    return _tried("screen", regime, product(range(SCREENING_SEED, SCREENING_SEED + seeds), study.SCREENED, study.FORMS))


def end(regime: study.Regime, seeds: int) -> Iterator[Training]:
    """Every share of the epochs in which features may teach."""
    return _tried("end", regime, product(range(ENDING_SEED, ENDING_SEED + seeds), study.PAIRS, study.ENDS))


def switch(regime: study.Regime, seeds: int) -> Iterator[Training]:
    """Every way to make prompts cheaper."""
    return _tried("switch", regime, product(range(SWITCH_SEED, SWITCH_SEED + seeds), study.SCREENED, study.SWITCHES))


def cells(regime: study.Regime, seeds: int) -> Iterator[Training]:
    """Every number of cells that a region may have."""
    return _tried("cells", regime, product(range(CELLS_SEED, CELLS_SEED + seeds), study.FINE, study.CELLS))


def _tried(phase: str, regime: study.Regime, which: Iterable[tuple[int, study.Pair, study.Method]]) -> Iterator[Training]:
    rates = _rates(regime)
    for seed, pair, form in which:
        yield Training(phase, regime, pair, form, 0, seed, regime.epochs[pair.student], rates[pair.student])


def tune(regime: study.Regime, seeds: int) -> Iterator[Training]:
    """Every setting of every method, once per pair, on a quarter of the schedule."""
    _refuse_settled(regime)
    rates = _rates(regime)
    for pair in study.PAIRS:
        epochs, rate = max(1, regime.epochs[pair.student] // 4), rates[pair.student]
        for method in (*study.METHODS, *study.TRIED):
            for choice in range(len(method.choices) if len(method.choices) > 1 else 0):
                yield Training("tune", regime, pair, method, choice, TUNING_SEED, epochs, rate)


def retune(regime: study.Regime, seeds: int) -> Iterator[Training]:
    """Every setting once more: teachers were fitted anew since some were tuned. What was chosen stays; the page shows both."""
    return (dataclasses.replace(training, phase="retune") for training in tune(regime, seeds))


def pace(regime: study.Regime, seeds: int) -> Iterator[Training]:
    """Few epochs of every method that equal compute is about, in turns: only seconds from side by side may be divided."""
    _refuse_settled(regime)
    lines, rates = recorded(), _rates(regime)
    for number, pair, method in product(range(seeds), study.PAIRS, study.PACED):
        yield Training("pace", regime, pair, method, _tuned(method, regime, lines), number, PACE_EPOCHS, rates[pair.student])


def compare(regime: study.Regime, seeds: int) -> Iterator[Training]:
    """Every method at its tuned setting, then ablations and equal compute; seeds outermost, so that what is there is comparable."""
    lines, rates = recorded(), _rates(regime)
    for methods, seed in product((study.METHODS, study.COMPARED[len(study.METHODS) :]), range(seeds)):
        for pair, method in product(study.PAIRS, methods):
            epochs = _epochs(method, regime, pair, lines)
            yield Training("compare", regime, pair, method, _tuned(method, regime, lines), seed, epochs, rates[pair.student])


def everything(regime: study.Regime, seeds: int) -> Iterator[Training]:
    """All phases, each after those whose findings it needs."""
    for phase in (compare,) if regime.settled else (rate, tune, retune, pace, screen, end, switch, cells, compare):
        yield from phase(regime, seeds)


def _epochs(method: study.Method, regime: study.Regime, pair: study.Pair, lines: list[dict]) -> int:
    """By the method's length."""
    epochs = regime.epochs[pair.student]
    if method.length == study.EQUAL:
        factor = paces(lines, regime).get((method.tuned_as, pair.name))
        if factor is None:
            raise click.ClickException(f"not known yet what {method.tuned_as} takes on {pair.name}: run the phase 'pace' first")
        return round(epochs * max(1.0, factor))
    return 2 * epochs if method.length == study.TWICE else epochs


def _rates(regime: study.Regime) -> dict[str, float]:
    """student -> the learning rate with which it validated best when trained alone."""
    name = regime.settled or regime.name
    best: dict[str, tuple[float, float]] = {}
    for line in recorded():
        if (line["phase"], line.get("regime")) == ("rate", name):
            student = line["pair"].split()[-1]
            best[student] = max(best.get(student, (0.0, 0.0)), (line["validation"], line["plan"]["lr"]))
    if missing := {pair.student for pair in study.PAIRS} - best.keys():
        raise click.ClickException(f"no learning rate yet for {', '.join(sorted(missing))}: run the phase 'rate' first")
    return {student: lr for student, (_, lr) in best.items()}


def _tuned(method: study.Method, regime: study.Regime, lines: list[dict]) -> int:
    """The setting with the best mean validation accuracy over pairs: one for all of them, as the default plan is."""
    if len(method.choices) == 1:
        return 0
    means = []
    for choice in range(len(method.choices)):
        wanted = json.loads(json.dumps({**method.plan, **method.choices[choice]}))
        found = [
            line["validation"]
            for line in lines
            if line["phase"] == "tune"
            and line["regime"] == (regime.settled or regime.name)
            and line["method"] == method.tuned_as
            and wanted.items() <= line["plan"].items()
        ]
        if len(found) != len(study.PAIRS):
            raise click.ClickException(f"{method.name} is not tuned yet: run the phase 'tune' first")
        means.append(sum(found) / len(found))
    return means.index(max(means))


def asked(trainings: Iterable[Training], only: str | None, pair: str | None, quick: bool) -> Iterator[Training]:
    """Those of the methods and pairs that are named; a quick run to which none is named leaves out what only explains."""
    left_out = (*study.ABLATIONS, *study.RIVALS) if quick and not only else ()
    for training in trainings:
        named = (only or "") in training.method.name and (pair or "") in training.pair.name
        if named and training.method not in left_out:
            yield training


PHASES = {
    "all": everything,
    "rate": rate,
    "screen": screen,
    "end": end,
    "switch": switch,
    "cells": cells,
    "tune": tune,
    "retune": retune,
    "pace": pace,
    "compare": compare,
}


@click.command()
@click.argument("phase", type=click.Choice([*PHASES, "report"]))
@click.option("--regime", type=click.Choice(list(study.REGIMES)), help="Unless said, small; of 'all', every one.")
@click.option("--seeds", default=5, show_default=True)
@click.option("--root", default="/usr/share/datasets/fashion-mnist", show_default=True, help="Fashion-MNIST's four IDX files.")
@click.option("--work", type=click.Path(path_type=Path), default="runs/distillation", show_default=True)
@click.option("--threads", default=1, show_default=True)
@click.option("--only", help="Only methods whose name contains this.")
@click.option("--pair", "pair_name", help="Only pairs whose name contains this.")
@click.option("--quick", is_flag=True, help=f"One seed, {QUICK_EPOCHS} epochs, no ablations: under 20 minutes; in --work alone.")
@click.option("--quiet", is_flag=True)
def main(
    phase: str, regime: str | None, seeds: int, root: str, work: Path, threads: int, only: str | None, pair_name: str | None,
    quick: bool, quiet: bool,
) -> None:  # fmt: skip
    """Run PHASE and record it."""
    work.mkdir(parents=True, exist_ok=True)
    folder = work if quick else HERE
    results = folder / RESULTS.name
    chosen = [study.REGIMES[regime or "small"]] if regime or phase != "all" else list(study.REGIMES.values())
    if quick:
        chosen = [each.glimpse(QUICK_EPOCHS) for each in chosen]
    if phase != "report":
        room = Room(root, work.absolute(), threads, Quiet() if quiet else Terminal(), results)
        trainings = (training for each in chosen for training in PHASES[phase](each, 1 if quick else seeds))
        for training in asked(trainings, only, pair_name, quick):
            if not _is_done(training, recorded(results)):
                room.train(training)
    report.write(recorded(results), chosen if quick else study.REGIMES.values(), folder)


if __name__ == "__main__":
    main()
