"""What this benchmark was meant to show, and whether it does: held to the record by itself."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import mean

import study
from evidence import Scores, against, forgotten, gains, latest, told_p

ROOM, LEAD, SIGNIFICANT, UNDERFIT, FORGOTTEN, FEEDBACK = 4.0, 2.0, 0.05, 0.5, 1.0, 0.5
Row = tuple[str, str, bool]
"""A goal, what was found, and whether it is met."""

_RIVALS = {"KD": True, "OFA": True, "RSD": False}
"""Whether p is to be below `SIGNIFICANT` when it is corrected, too."""


def section(lines: Sequence[dict], regimes: Iterable[study.Regime]) -> list[str]:
    """A table of goals per regime that has been compared."""
    rows = [(regime, row) for regime in regimes for row in _rows(lines, regime)]
    told = [f"| {regime.described} | {goal} | {found} | {'yes' if met else '**no**'} |" for regime, (goal, found, met) in rows]
    head = [
        "## Goals",
        "",
        f"Of {study.DEFAULT!r}, on test images, in points, unless said otherwise; p over seeds, corrected for all rows of the",
        "table. What the teacher forgets is the prompted teacher's drop on 512 validation images, a mean over seeds.",
        "",
        "| students | goal | found | met |",
        "|---|---|---|---|",
    ]
    return [*head, *told, ""] if told else []


def _rows(lines: Sequence[dict], regime: study.Regime) -> list[Row]:
    scores = latest(lines, "compare", regime, "test")
    if study.DEFAULT not in scores:
        return []
    return [
        *_leads(lines, regime, scores),
        *_rivals(scores),
        *_trained_out(lines, regime),
        *_remembering(lines, regime),
        *_feedback(lines, regime),
    ]


def _leads(lines: Sequence[dict], regime: study.Regime, scores: Scores) -> list[Row]:
    """Over the student alone, where there is something to learn."""
    teachers = {line["teacher"]: line["test"] for line in lines if _taught(line, regime)}
    rows = []
    for pair in study.PAIRS:
        both = [scores[name] for name in (study.DEFAULT, study.METHODS[0].name)]
        common = [block for block in both[0].keys() & both[1].keys() if block[0] == pair.name]
        if not common or pair.teacher not in teachers:
            continue
        ours, alone = (100 * mean(found[block] for block in common) for found in both)
        room = 100 * teachers[pair.teacher] - alone
        goal = f"{pair.name}: ahead of the student alone by {LEAD:g} where the teacher is by {ROOM:g}"
        if room >= ROOM:
            rows.append((goal, f"{ours - alone:+.2f}, the teacher {room:+.1f}", ours - alone >= LEAD))
    return rows


def _taught(line: dict, regime: study.Regime) -> bool:
    return line["phase"] == "teacher" and line["epochs"] == regime.teacher_epochs


def _rivals(scores: Scores) -> list[Row]:
    """Over other methods, on the average of all pairs."""
    named = [method.name for method in study.COMPARED if method.name in scores]
    tests, corrected = against(scores, named, study.DEFAULT)
    rows = []
    for name, strictly in _RIVALS.items():
        difference, p, _ = tests.get(name, (0.0, None, 0))
        if p is not None:
            goal = f"ahead of {name}, {'corrected p' if strictly else 'p'} below {SIGNIFICANT:g}"
            found = f"{-100 * difference:+.2f}, p {told_p(p)}, corrected {told_p(corrected[name])}"
            rows.append((goal, found, difference < 0 and (corrected[name] if strictly else p) < SIGNIFICANT))
    return rows


def _trained_out(lines: Sequence[dict], regime: study.Regime) -> list[Row]:
    goal = f"{{}}: twice as many epochs bring it less than {UNDERFIT:g} alone, on validation images"
    return [(goal.format(gain.student), f"{gain.points:+.2f}", gain.points < UNDERFIT) for gain in gains(lines, regime)]


def _remembering(lines: Sequence[dict], regime: study.Regime) -> list[Row]:
    rows = [row for row in forgotten(lines, "compare", regime) if row.form == study.DEFAULT]
    goal = f"{{}}: the teacher forgets less than {FORGOTTEN:g}"
    return [(goal.format(row.pair), f"{mean(row.drops):+.2f}", mean(row.drops) < FORGOTTEN) for row in rows]


def _feedback(lines: Sequence[dict], regime: study.Regime) -> list[Row]:
    """The form of feedback that brings most, of those with seeds enough for a p."""
    scores = latest(lines, "screen", regime, "validation")
    named = [form.name for form in study.FORMS if form.name in scores]
    tests, corrected = against(scores, named, study.UNFED)
    fed = [name for name in corrected if not name.startswith(study.UNFED)]
    if not fed:
        return []
    best = max(fed, key=lambda name: tests[name][0])
    lead = 100 * tests[best][0]
    found = f"{best}: {lead:+.2f}, corrected p {told_p(corrected[best])}; {len(fed)} forms with three seeds and more"
    goal = f"a form of feedback ahead of none by {FEEDBACK:g}, p below {SIGNIFICANT:g}, on validation images"
    return [(goal, found, lead >= FEEDBACK and corrected[best] < SIGNIFICANT)]
