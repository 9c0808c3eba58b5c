"""Does choosing by measurement find the best student, cheaply? Three p90 budgets per CPU target, nine contenders, one truth.

    python benchmarks/select/run.py --phase train      # the teacher and every contender's whole schedule; needs no quiet machine
    python benchmarks/select/run.py --phase measure    # latencies, budgets and the selections; on a quiet machine
    python benchmarks/select/run.py                    # both

Run again to resume: what is recorded is not done again. --quick does all of it in miniature and records nothing here.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
import sheet  # noqa: E402
from choosing import choose  # noqa: E402
from contenders import FULL, QUICK, TARGETS, Scale  # noqa: E402
from outcome import Record  # noqa: E402
from stopwatch import time_all  # noqa: E402
from workroom import Task, Workroom  # noqa: E402

from fofa_deploy import environment  # noqa: E402
from fofa_deploy.progress import Progress, Quiet, Terminal  # noqa: E402

WORK = HERE.parent.parent / "runs" / "select"
PHASES = ("train", "measure", "page")
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
    """Latencies and budgets of the targets that are not recorded, then every selection that is not."""
    untrained = [name for name in room.scale.contenders if name not in notebook.record.truth()]
    if untrained:
        raise click.ClickException(f"not trained yet: {', '.join(untrained)}; run with --phase train first")
    tasks = [Task(contender=name, method="default") for name in room.scale.contenders]
    for target in TARGETS:
        if target not in {times.target for times in notebook.record.times}:
            notebook.note(times=(*notebook.record.times, time_all(room, tasks, target)))
    for times in notebook.record.times:
        for budget in times.budgets_ms:
            if notebook.record.pick(times.target, budget) is None:
                notebook.note(picks=(*notebook.record.picks, choose(room, times.target, budget)))


@click.command()
@click.option("--phase", type=click.Choice([*PHASES, "all"]), default="all", show_default=True)
@click.option("--jobs", default=2, show_default=True, help="Trainings side by side, one thread each.")
@click.option("--root", default=FASHION, show_default=True, help="Fashion-MNIST's four IDX files.")
@click.option("--work", type=click.Path(path_type=Path, file_okay=False), default=WORK, help="Shared with benchmarks/frontier.")
@click.option("--quick", is_flag=True, help="Four contenders, hardly trained, in a few minutes; printed, and kept in WORK/quick alone.")
@click.option("--quiet", is_flag=True)
def main(phase: str, jobs: int, root: str, work: Path, quick: bool, quiet: bool) -> None:
    """Run what is missing, and write results.json, README.md and the picture."""
    folder, scale = (work / "quick", QUICK) if quick else (work, FULL)
    folder.mkdir(parents=True, exist_ok=True)
    progress: Progress = Quiet() if quiet else Terminal()
    room = Workroom(root, folder.absolute(), scale, progress)
    notebook = Notebook(folder if quick else HERE, scale)
    if phase in ("train", "all"):
        train(room, notebook, jobs)
    if phase in ("measure", "all"):
        measure(room, notebook)
    notebook.write()
    if quick:
        click.echo((folder / "README.md").read_text())


if __name__ == "__main__":
    main()
