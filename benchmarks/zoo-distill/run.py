"""Every timm model family through real FOFA steps, as teacher and as student: what works, what fails, and why.

python benchmarks/zoo-distill/run.py            # all families, resuming; failures are tried again
python benchmarks/zoo-distill/run.py --only levit --only swin_transformer
python benchmarks/zoo-distill/run.py --quick    # a handful, not recorded
"""

from __future__ import annotations

from pathlib import Path

import click
from keeper import Keeper, conditions, described, load, save, table

from fofa_deploy.errors import FofaError

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
below 64 px the last map is one pixel), six of them with four blocks for the sake of memory (depth=4), with seeded random weights
and 5 classes. A trial is two AdamW steps of FOFA, batches of 3 and 2, prompts with feedback in every stage that can be prompted,
4 regions of width 16, in a child process with limits on time and memory; a trial that fails ends its process. *Prompted*: how many
of the teacher's stages could have a prompt; *layouts*: how its stages hand on features, with so many tokens in front of the map's;
*s / MiB*: what the trial took.

- **Teacher**: weights shifted by noise of 0.02, so that no branch is dead; the student is `mobilenetv3_small_050`, once more on
  larger images. Works means: with b = 0 the prompted features and logits are the plain ones (1e-3 of their root mean square),
  losses are finite, every trained part gets a gradient, the teacher is bit for bit unchanged and in eval mode, a reversed batch
  gives reversed outputs, no hook is left.
- **Student**: weights as timm starts them; the teacher is `pvt_v2_b0`. Works means: the same, and every tensor of the student
  that plain cross-entropy trains had a gradient and moved.
- **Non-square**: teacher once more, one step on images twice as wide as high. Families that insist on squares refuse.
"""


@click.command()
@click.option("--only", multiple=True, metavar="FAMILY", help="Try this family again, whatever is recorded.")
@click.option("--quick", is_flag=True, help=f"Only {', '.join(QUICK)}; nothing is recorded.")
@click.option("--seconds", default=240.0, help="Time limit of one trial.")
@click.option("--memory-gib", default=8.0, help="Memory limit of one trial.")
def main(only: tuple[str, ...], quick: bool, seconds: float, memory_gib: float) -> None:
    """Put the families through their trials, recording each as it finishes."""
    import timm

    record = load(RESULTS)
    families = QUICK if quick else only or timm.list_modules()
    with Keeper("trial:Zoo", [HERE], seconds, int(memory_gib * 2**30)) as zoo:
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
                save(RESULTS, {family: entry}, page)


def _done(role: str, trials: dict) -> bool:
    return role in trials and (_works(trials[role]) or role not in PASSES[0])


def _attempt(zoo: Keeper, role: str, entry: dict) -> dict:
    try:
        return zoo.ask("attempt", role=role, candidate=zoo.candidate(entry))
    except FofaError as error:
        return {"failed": str(error)}


def _works(trial: dict) -> bool:
    return trial.get("problems") == []


def _verdict(trial: dict) -> str:
    if _works(trial):
        return "works"
    return trial["failed"] if "failed" in trial else "; ".join(trial["problems"])


# --- page -----------------------------------------------------------------------------------------------------


def page(record: dict) -> str:
    """README.md, from the record alone."""
    families, environment = record["families"], record["environment"]
    tally = ", ".join(f"{_tally(families, role)} {words}" for role, words in TALLIED)
    lines = [
        "# Every timm family as teacher and as student",
        "",
        "Written by `python benchmarks/zoo-distill/run.py`; nothing here is typed by hand.",
        "",
        f"**{tally}.**",
        "",
        f"{conditions(environment, ('torch', 'timm', 'fofa-deploy'))} Seconds do not compare: the machine's"
        f" load average was {environment['load_average']:.1f} on {environment['cores']} cores at the last trial.",
        "",
        *METHOD.strip().splitlines(),
        "",
        *table(COLUMNS, [_row(family, entry) for family, entry in families.items()]),
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
    trials = entry["trials"]
    teacher, student = trials.get("as_teacher", {}), trials.get("as_student", {})
    stages = teacher.get("stages") or student.get("stages") or []
    return [
        family,
        *described(entry),
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


if __name__ == "__main__":
    main()
