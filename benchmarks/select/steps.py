"""The steps of the benchmark, each of them recorded as soon as it is done; benchmarks/frontier begins with the same ones."""

from __future__ import annotations

import json
from pathlib import Path

import click
import sheet
from choosing import choose
from contenders import TARGETS, Scale
from outcome import Record
from stopwatch import time_all
from workroom import Task, Workroom

from fofa_deploy import environment

WORK = Path(__file__).parent.parent.parent / "runs" / "select"
FASHION = "/usr/share/datasets/fashion-mnist"


class Notebook:
    """The record, written to its folder after every step."""

    def __init__(self, folder: Path, scale: Scale) -> None:
        self._folder = folder
        self.record = self._read(scale)

    def _read(self, scale: Scale) -> Record:
        path = self._folder / "results.json"
        if not path.is_file():
            return Record(scale=scale)
        found = Record.model_validate(json.loads(path.read_bytes())["record"])
        if found.scale != scale:
            raise click.ClickException(f"{path} was recorded with other contenders or schedules: move it away to start anew")
        return found

    def note(self, **changes: object) -> None:
        self.record = self.record.model_copy(update={"environment": environment.describe(), **changes})
        self.write()

    def write(self) -> None:
        sheet.write(self.record, self._folder)


def train(room: Workroom, notebook: Notebook, jobs: int) -> None:
    """The teacher, and the whole schedule of every contender that is not recorded."""
    if notebook.record.teacher is None:
        notebook.note(teacher=room.taught())
    known = notebook.record.truth()
    tasks = [Task(contender=name, method="default") for name in room.scale.contenders if name not in known]
    for done in room.train_all(tasks, jobs):
        notebook.note(trainings=(*notebook.record.trainings, done))


def measure(room: Workroom, notebook: Notebook) -> None:
    """Latencies and budgets of the targets that are not recorded."""
    untrained = [name for name in room.scale.contenders if name not in notebook.record.truth()]
    if untrained:
        raise click.ClickException(f"not trained yet: {', '.join(untrained)}; run with --phase train first")
    tasks = [Task(contender=name, method="default") for name in room.scale.contenders]
    for target in TARGETS:
        if target not in {times.target for times in notebook.record.times}:
            notebook.note(times=(*notebook.record.times, time_all(room, tasks, target)))


def choose_all(room: Workroom, notebook: Notebook) -> None:
    """Every selection that is not recorded."""
    if missing := [target for target in TARGETS if target not in {times.target for times in notebook.record.times}]:
        raise click.ClickException(f"no budgets for {', '.join(missing)} yet; run with --phase measure first")
    for times in notebook.record.times:
        for budget in times.budgets_ms:
            if notebook.record.pick(times.target, budget) is None:
                notebook.note(picks=(*notebook.record.picks, choose(room, times.target, budget)))
