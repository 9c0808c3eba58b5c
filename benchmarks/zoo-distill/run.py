"""Every timm model family through real FOFA steps, as teacher and as student: what works, what fails, and why.

python benchmarks/zoo-distill/run.py            # all families, resuming; failures are tried again
python benchmarks/zoo-distill/run.py --only levit --only swin_transformer
python benchmarks/zoo-distill/run.py --quick    # a handful, not recorded
"""

from __future__ import annotations

import fcntl
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import click

HERE = Path(__file__).parent
RESULTS = HERE / "results.json"
PASSES = (("as_teacher", "as_student"), ("non_square",))
"""What is asked of every family; and what is recorded of it."""
QUICK = ("resnet", "vision_transformer", "swin_transformer", "mlp_mixer", "levit", "maxxvit")
TALLIED = (("as_teacher", "as teacher"), ("as_student", "as student"), ("non_square", "as teacher on images twice as wide as high"))
COLUMNS = (
    *("family", "smallest model", "M parameters", "px", "teacher", "student", "non-square", "prompted", "layouts", "stages"),
    *("tensors with gradient", "teacher s / MiB", "student s / MiB"),
)
METHOD = """
A family is a module of `timm.models`, as `timm.list_modules()` names them. Each sends its classifier with the fewest parameters
(timm's `test_*` miniatures left out) at the smallest square image of 64 px or more that it takes (* = told to its constructor;
below 64 px the last map is one pixel), with seeded random weights and 5 classes. A trial is two AdamW steps of FOFA, batches of
3 and 2, prompts with feedback in every stage that can be prompted, 4 regions of width 16, in a child process with limits on
time and memory; a trial that fails ends its process.

- **Teacher**: weights shifted by noise of 0.02, so that no branch is dead; the student is `mobilenetv3_small_050`, once more on
  larger images. Works means: with b = 0 the prompted features and logits are the plain ones (1e-3 of their root mean square),
  losses are finite, every trained part gets a gradient, the teacher is bit for bit unchanged and in eval mode, a reversed batch
  gives reversed outputs, no hook is left.
- **Student**: weights as timm starts them; the teacher is `pvt_v2_b0`. Works means: the same, and every tensor of the student
  that plain cross-entropy trains had a gradient and moved.
- **Non-square**: teacher once more, one step on images twice as wide as high. Families that insist on squares refuse.
"""
MINIATURES = "test_"
"""timm's own for its tests; they do not count as the smallest of a family."""
SHRUNK: dict[str, dict] = {
    name: {"depth": 4}
    for name in (
        *("deepseek_vit_412m", "gemma4_vit_167m", "qwen3_vit_88m"),
        *("beit_base_patch16_224", "naflexvit_base_patch16_parfac_gap", "samvit_base_patch16_224"),
    )
}
"""Constructor arguments for smallest models that are still too large for a quick trial."""


@click.command()
@click.option("--only", multiple=True, metavar="FAMILY", help="Try this family again, whatever is recorded.")
@click.option("--quick", is_flag=True, help=f"Only {', '.join(QUICK)}; nothing is recorded.")
@click.option("--seconds", default=240.0, help="Time limit of one trial.")
@click.option("--memory-gib", default=8.0, help="Memory limit of one trial.")
def main(only: tuple[str, ...], quick: bool, seconds: float, memory_gib: float) -> None:
    """Put the families through their trials, recording each as it finishes."""
    import timm

    os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    record = _load()
    families = QUICK if quick else only or timm.list_modules()
    with _Zoo(seconds, int(memory_gib * 2**30)) as zoo:
        for family in families:
            if family not in record["families"]:
                record["families"][family] = {"smallest": zoo.ask("smallest", family=family), "trials": {}}
        ordered = sorted(families, key=lambda family: record["families"][family]["smallest"]["params"])
        for role, family in [(role, family) for roles in PASSES for family in ordered for role in roles]:
            entry = record["families"][family]
            if not only and not quick and _done(role, entry["trials"]):
                continue
            entry["trials"][role] = trial = _attempt(zoo, role, entry)
            click.echo(f"{family} {role}: {_verdict(trial)} {trial.get('seconds', '')}")
            if not quick:
                _save(family, entry)


class _Zoo:
    """A child process that answers until something goes wrong in it; then the next question goes to a new one."""

    def __init__(self, seconds: float, memory_bytes: int) -> None:
        self._limits = {"seconds": seconds, "memory_bytes": memory_bytes}
        self._child = None

    def ask(self, method: str, **arguments: Any) -> dict:  # noqa: ANN401 - JSON
        from trial import Rules

        from fofa_deploy.errors import FofaError
        from fofa_deploy.isolate import Child

        try:
            self._child = self._child or Child("trial:Zoo", Rules(ignored_prefix=MINIATURES), **self._limits)
            return self._child.call(method, **arguments)
        except FofaError:
            self._child = None
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._child is not None:
            self._child.close()


def _done(role: str, trials: dict) -> bool:
    return role in trials and (_works(trials[role]) or role not in PASSES[0])


def _attempt(zoo: _Zoo, role: str, entry: dict) -> dict:
    from fofa_deploy.errors import FofaError

    name = entry["smallest"]["name"]
    try:
        entry["candidate"] = entry.get("candidate") or zoo.ask("candidate", name=name, arguments=SHRUNK.get(name, {}))
        return zoo.ask("attempt", role=role, candidate=entry["candidate"])
    except FofaError as error:
        return {"failed": str(error)}


def _works(trial: dict) -> bool:
    return trial.get("problems") == []


def _verdict(trial: dict) -> str:
    if _works(trial):
        return "works"
    return trial["failed"] if "failed" in trial else "; ".join(trial["problems"])


def _save(family: str, entry: dict) -> None:
    """Into the file as it is now: runs over other families may be at it, too."""
    from fofa_deploy.environment import describe

    with Path(__file__).open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        record = _load()
        record["families"] = dict(sorted((record["families"] | {family: entry}).items()))
        record["environment"] = describe().model_dump(mode="json")
        scratch = RESULTS.with_suffix(".partial")
        scratch.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")
        scratch.replace(RESULTS)
        (HERE / "README.md").write_text(page(record))


def _load() -> dict:
    return json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"families": {}}


# --- page -----------------------------------------------------------------------------------------------------


def page(record: dict) -> str:
    """README.md, from the record alone."""
    families, environment = record["families"], record["environment"]
    versions = ", ".join(f"{name} {environment['versions'][name]}" for name in ("torch", "timm", "fofa-deploy"))
    tally = ", ".join(f"{_tally(families, role)} {words}" for role, words in TALLIED)
    lines = [
        "# Every timm family as teacher and as student",
        "",
        "Written by `python benchmarks/zoo-distill/run.py`; nothing here is typed by hand.",
        "",
        f"**{tally}.**",
        "",
        f"{environment['cpu']}, one thread, Python {environment['python']}; {versions}. Seconds do not compare: the machine's"
        f" load average was {environment['load_average']:.1f} on {environment['cores']} cores at the last trial.",
        "",
        *METHOD.strip().splitlines(),
        "",
        *_table(COLUMNS, [_row(family, entry) for family, entry in families.items()]),
    ]
    failures = [
        f"- {family}, {role.replace('_', ' ')}: {_verdict(trial)}"
        for family, entry in families.items()
        for role, trial in entry["trials"].items()
        if not _works(trial)
    ]
    lines += ["", "## What does not work", "", *(failures or ["Nothing."])]
    notices = [f"- {family}: {'; '.join(_own_notices(entry))}" for family, entry in families.items() if _own_notices(entry)]
    lines += ["", "## What the tapped models say about themselves", "", *(notices or ["Nothing."])]
    return "\n".join(lines) + "\n"


def _tally(families: dict, role: str) -> str:
    trials = [entry["trials"][role] for entry in families.values() if role in entry["trials"]]
    untried = len(families) - len(trials)
    return f"{sum(map(_works, trials))} of {len(families)}{f' ({untried} not tried)' if untried else ''}"


def _own_notices(entry: dict) -> list[str]:
    """Of the family's model, not of its fixed partner."""
    return entry["trials"].get("as_teacher", {}).get("notices", [])


def _row(family: str, entry: dict) -> list[str]:
    candidate, trials = entry.get("candidate", {}), entry["trials"]
    teacher, student = trials.get("as_teacher", {}), trials.get("as_student", {})
    stages = teacher.get("stages") or student.get("stages") or []
    size = f"{candidate['side']}{'*' if candidate['sized'] else ''}" if candidate else ""
    shrunk = ", ".join(f"{name}={value}" for name, value in candidate.get("arguments", {}).items())
    return [
        family,
        entry["smallest"]["name"] + (f" ({shrunk})" if shrunk else ""),
        f"{candidate.get('params', entry['smallest']['params']) / 1e6:.1f}",
        size,
        *(_short(trials, role) for role, _ in TALLIED),
        f"{sum(bool(stage['prompt']) for stage in stages)} of {len(stages)}",
        ", ".join(dict.fromkeys(stage["layout"] for stage in stages)),
        " ".join(f"{stage['module']}" for stage in stages),
        f"{student['figures']['share with gradient']:.0%}" if "figures" in student else "",
        *(f"{trial['seconds']:.0f} / {trial['peak_mib']}" if "seconds" in trial else "" for trial in (teacher, student)),
    ]


def _short(trials: dict, role: str) -> str:
    if role not in trials:
        return "not tried"
    return "yes" if _works(trials[role]) else "**no**"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(cells) + " |" for cells in [columns, ["---"] * len(columns), *rows]]


if __name__ == "__main__":
    sys.path.insert(0, str(HERE))
    main()
