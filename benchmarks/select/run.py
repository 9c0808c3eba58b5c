"""Does choosing by measurement find the best student, cheaply? Three p90 budgets per CPU target, ten contenders, one truth.

    python benchmarks/select/run.py --phase train      # the teacher and every contender's whole schedule; needs no quiet machine
    python benchmarks/select/run.py --phase measure    # latencies of the contenders, and the budgets; on a quiet machine
    python benchmarks/select/run.py --phase choose     # the selections, which measure and train by themselves; on a quiet machine
    python benchmarks/select/run.py                    # all of it

Run again to resume: what is recorded is not done again. --quick does all of it in miniature and records nothing here.
"""

from __future__ import annotations

import sys
from pathlib import Path

import click

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
from contenders import FULL, QUICK  # noqa: E402 - neighbours of this file
from steps import FASHION, WORK, Notebook, choose_all, measure, train  # noqa: E402
from workroom import Workroom  # noqa: E402

from fofa_deploy.progress import Progress, Quiet, Terminal  # noqa: E402

PHASES = ("train", "measure", "choose", "page")


@click.command()
@click.option("--phase", type=click.Choice([*PHASES, "all"]), default="all", show_default=True)
@click.option("--jobs", default=2, show_default=True, help="Trainings side by side, one thread each.")
@click.option("--root", default=FASHION, show_default=True, help="Fashion-MNIST's four IDX files.")
@click.option("--work", type=click.Path(path_type=Path, file_okay=False), default=WORK, help="Shared with benchmarks/frontier.")
@click.option(
    "--quick", is_flag=True, help="Four contenders, hardly trained, in a few minutes; printed, and kept in WORK/quick alone."
)
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
    if phase in ("choose", "all"):
        choose_all(room, notebook)
    notebook.write()
    if quick:
        click.echo((folder / "README.md").read_text())


if __name__ == "__main__":
    main()
