"""Is what fofa-deploy deploys faster, at the same fidelity, than the best that any other tool makes of the same model here?

    python benchmarks/peers/run.py --phase prepare     # train, tune, build every peer, compare with PyTorch: an hour or more
    python benchmarks/peers/run.py --phase measure     # on a quiet machine: minutes, all timing, and the page

Run again to resume; --quick does all of it in miniature and records nothing.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

HERE = Path(__file__).parent
MODELS = ("efficientnet-lite0", "resnet18", "vit-tiny")
TARGETS = ("cpu-onnxruntime", "cpu-openvino", "any-runtime")


@click.command()
@click.option("--phase", type=click.Choice(("prepare", "measure", "page", "all")), default="all")
@click.option("--models", default=",".join(MODELS), help="Some of them, with commas between.")
@click.option("--targets", default=",".join(TARGETS), help="Some of them; any-runtime races the best of the others and PyTorch.")
@click.option("--work", type=click.Path(path_type=Path, file_okay=False), default=HERE.parent.parent / "runs" / "peers")
@click.option("--quick", is_flag=True, help="Hardly trained models, few images, few rounds; printed, and kept in WORK/quick alone.")
@click.option("--again", is_flag=True, help="Measure again what has been measured.")
def main(phase: str, models: str, targets: str, work: Path, quick: bool, again: bool) -> None:
    """Prepare everybody, measure them side by side, write results.json, README.md and the pictures."""
    import backends
    import standings

    work = work.absolute()
    folder = work / "quick" if quick else work
    folder.mkdir(parents=True, exist_ok=True)
    backends.register(work)
    chosen, wanted = _known(models, MODELS), _known(targets, TARGETS)
    if phase in ("prepare", "all"):
        for model in chosen:
            _prepare(model, wanted, folder / model, work / "environments", quick)
    if phase in ("measure", "all"):
        for model in chosen:
            _measure(model, wanted, folder / model, quick, again)
    if phase != "prepare":
        out = folder if quick else HERE
        record = standings.gather([folder / model for model in MODELS], work)
        (out / "results.json").write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")
        standings.write(record, out)
        click.echo((out / "README.md").read_text())


def _known(names: str, known: tuple[str, ...]) -> list[str]:
    found = [name.strip() for name in names.split(",")]
    if unknown := [name for name in found if name not in known]:
        raise click.BadParameter(f"{', '.join(unknown)}: choose from {', '.join(known)}")
    return found


def _prepare(model: str, targets: list[str], work: Path, environments: Path, quick: bool) -> None:
    import models
    from entries import field_of
    from peers import peers_for
    from races import ANY, RUNTIMES

    from fofa_deploy.progress import Terminal

    subject = next(subject for subject in models.SUBJECTS if subject.name == model)
    progress = Terminal()
    models.prepare(subject, work, quick, progress)
    runtimes = {"onnxruntime", "openvino", "torch"} if ANY in targets else {RUNTIMES[target] for target in targets}
    field_of(model, work, runtimes, peers_for(runtimes, bool(subject.heads)), environments, progress)


def _measure(model: str, targets: list[str], work: Path, quick: bool, again: bool) -> None:
    from contest import Rounds
    from entries import Field
    from races import ANY, race

    from fofa_deploy.progress import Terminal

    if not (work / "field.json").is_file():
        raise click.ClickException(f"{model} is not prepared: run with --phase prepare first")
    field = Field.model_validate_json((work / "field.json").read_bytes())
    for target in targets:
        rounds = Rounds(heats=5, counting=5) if target == ANY else Rounds()  # PyTorch's compilers take long to start
        rounds = Rounds(screening=2, heats=2, counting=2) if quick else rounds
        done = race(field, target, work, rounds, again, Terminal())
        click.echo(f"{model}, {target}: {len(done.laps)} raced in {done.seconds:.0f} s")


if __name__ == "__main__":
    sys.path.insert(0, str(HERE))
    main()
