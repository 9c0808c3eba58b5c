"""What does the whole pipeline bring within a budget of latency, and what would one have otherwise? The figure a user decides by.

    python benchmarks/frontier/run.py --phase select    # what benchmarks/select has not recorded yet; timing needs a quiet machine
    python benchmarks/frontier/run.py --phase screen    # rivals' latencies, by which their models are chosen; on a quiet machine
    python benchmarks/frontier/run.py --phase train     # what neither benchmark has trained
    python benchmarks/frontier/run.py --phase measure   # deploy everything and race it; on a quiet machine
    python benchmarks/frontier/run.py                   # all of it

Run again to resume: what is recorded is not done again. --quick does all of it in miniature and records nothing here.
"""

from __future__ import annotations

import sys
from pathlib import Path

import click

HERE = Path(__file__).parent
SELECT = HERE.parent / "select"
sys.path[:0] = [str(HERE), str(SELECT)]
import rounds  # noqa: E402 - a neighbour of this file
import steps  # noqa: E402 - of benchmarks/select
from contenders import FULL, QUICK  # noqa: E402
from rivals import register  # noqa: E402
from workroom import Workroom  # noqa: E402

from fofa_deploy.progress import Progress, Quiet, Terminal  # noqa: E402

PHASES = ("select", "screen", "train", "measure", "page")


@click.command()
@click.option("--phase", type=click.Choice([*PHASES, "all"]), default="all", show_default=True)
@click.option("--jobs", default=2, show_default=True, help="Trainings side by side, one thread each.")
@click.option("--root", default=steps.FASHION, show_default=True, help="Fashion-MNIST's four IDX files.")
@click.option("--work", type=click.Path(path_type=Path, file_okay=False), default=steps.WORK, help="Shared with benchmarks/select.")
@click.option("--quick", is_flag=True, help="Four contenders, one seed, in a few minutes; printed, and kept in WORK/quick alone.")
@click.option("--again", is_flag=True, help="Race again what has been raced for the page.")
@click.option("--quiet", is_flag=True)
def main(phase: str, jobs: int, root: str, work: Path, quick: bool, again: bool, quiet: bool) -> None:
    """Run what is missing, and write results.json, README.md and the picture."""
    folder, scale = (work / "quick", QUICK) if quick else (work, FULL)
    folder = folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    register(folder)
    progress: Progress = Quiet() if quiet else Terminal()
    room = Workroom(root, folder, scale, progress)
    notebook = steps.Notebook(folder if quick else SELECT, scale)
    if phase in ("select", "all"):
        steps.train(room, notebook, jobs)
        steps.measure(room, notebook)
        steps.choose_all(room, notebook)
    out = folder / "frontier" if quick else HERE
    ledger = rounds.Ledger(out, rounds.QUICK_SEEDS if quick else rounds.SEEDS, notebook.record)
    if phase in ("screen", "all"):
        rounds.screen(room, ledger)
    if phase in ("train", "all"):
        rounds.train(room, ledger, jobs)
    if phase in ("measure", "all"):
        if again:
            ledger.note(races=())
        rounds.measure(room, ledger)
    ledger.write()
    if quick:
        click.echo((out / "README.md").read_text())


if __name__ == "__main__":
    main()
