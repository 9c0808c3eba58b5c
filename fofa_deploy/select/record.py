"""What a selection leaves: selection.json, a page and a picture. Latencies in it are an aid for choosing, not a result."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, PositiveInt

from fofa_deploy.config import ModelPlan, Size, size_name
from fofa_deploy.results import CandidateRow, StudentChoice
from fofa_deploy.select.choose import Speed
from fofa_deploy.select.forecast import Forecast, Point
from fofa_deploy.types import Frozen

RECORD, PAGE, PICTURE = "selection.json", "selection.md", "front.svg"


class OnTarget(Frozen):
    """A candidate on one target, in the recipe that counts: the fastest that keeps the budgets, or just the fastest."""

    target: str
    recipe: str
    speed: Speed | None
    missed: tuple[str, ...] = Field(description="limits that it does not keep")
    failures: tuple[str, ...] = Field(description="recipes that could not be built or run")


class Judged(Frozen):
    """One candidate, as far as it got."""

    name: str
    student: ModelPlan
    image_size: Size | None = Field(default=None, description="height, width; records from before it was a choice lack it")
    params: PositiveInt | None
    fault: str = Field(default="", description="why it could not be captured, or trained")
    ready: bool = Field(default=False, description="the teacher itself; its one rung is the accuracy it has")
    targets: tuple[OnTarget, ...]
    rungs: tuple[Point, ...]
    foretold: Forecast | None = None
    affinity: float | None = Field(
        default=None, description="linear CKA to the teacher after the first rung, 0 to 1; decides nothing"
    )
    chosen: bool = False
    chosen_for: tuple[str, ...] = Field(default=(), description="targets, where each has a student of its own")

    def on(self, target: str) -> OnTarget | None:
        return next((row for row in self.targets if row.target == target), None)

    @property
    def fate(self) -> str:
        """In words."""
        if self.chosen:
            return f"**chosen**{' for ' if self.chosen_for else ''}{', '.join(self.chosen_for)}"
        missed = [f"{row.target}: {problem.removeprefix(f'{self.name}: ')}" for row in self.targets for problem in row.missed]
        if self.params is None:
            return f"not captured: {self.fault}" if self.fault else "not captured"
        if missed:
            return "; ".join(missed)
        if self.fault:
            return f"cannot be trained: {self.fault}"
        if self.ready:
            return "is there already; another is as good and faster, or better"
        return f"dropped after {len(self.rungs)} {'rung' if len(self.rungs) == 1 else 'rungs'}"


class Choice(Frozen):
    """One student, for all targets or for one."""

    student: ModelPlan
    name: str
    ready: bool = Field(default=False, description="the teacher itself, which is deployed as it is")
    foretold: Forecast = Field(description="validation accuracy of the chosen one after the whole training")
    target: str = Field(description="whose latency decides between equals")
    front: tuple[str, ...] = Field(description="those that no other one beats in foretold accuracy and latency, the fastest first")


class Selection(Choice):
    """The whole record: the choice for all targets, or the first target's, and the others'."""

    schema_version: Literal[1] = 1
    others: tuple[Choice, ...] = Field(default=(), description="select.fit = 'each': what was chosen for the other targets")
    candidates: tuple[Judged, ...]
    made_at: str
    notices: tuple[str, ...] = ()

    @property
    def choices(self) -> tuple[Choice, ...]:
        return (self, *self.others)

    @classmethod
    def load(cls, folder: Path) -> Self:
        return cls.model_validate_json((folder / RECORD).read_bytes())

    def kept_word(self, reached: float | None) -> str:
        """What was foretold of the chosen one, beside what became of it."""
        told = f"{self.name} was chosen of {len(self.candidates)} candidates ({PAGE} in selection/)"
        found = "" if reached is None else f", {reached:.1%} reached"
        return f"{told}: {self.foretold.top1:.1%} validation accuracy foretold{found}"

    def _best_first(self) -> list[Judged]:
        return sorted(self.candidates, key=lambda one: -(one.foretold.top1 if one.foretold else -1))

    def told(self) -> StudentChoice:
        """For the report: the best foretold first, then in the plan's order."""
        rows = tuple(_told(one, self.target, self.front) for one in self._best_first())
        return StudentChoice(target=self.target, made_at=self.made_at, rows=rows)

    def write(self, folder: Path) -> None:
        (folder / RECORD).write_text(self.model_dump_json(indent=1))
        (folder / PAGE).write_text(self.page())
        self.draw(folder / PICTURE)

    def page(self) -> str:
        """Markdown: a table per choice."""
        lines = ["# Which student", ""]
        for choice in self.choices:
            lines += [f"## {choice.target}: {choice.name}", ""] if self.others else []
            lines += [*self._table(choice.target), ""]
        lines += [f"![foretold accuracy and latency]({PICTURE})", *(f"\n- {notice}" for notice in self.notices)]
        return "\n".join(lines) + "\n"

    def _table(self, target: str) -> list[str]:
        head = "| candidate | input | parameters | recipe | p50 ms | p90 ms | KiB | rungs, validation | affinity | foretold | |"
        told = f"Latencies on {target}, with random weights, {self.made_at}: an aid; the chosen one is measured anew."
        return [told, "", head, "|---" * 11 + "|", *(_row(one, target) for one in self._best_first())]

    def draw(self, path: Path) -> None:
        """Foretold accuracy over measured p50 latency, as SVG, the front as a line; a panel per choice."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7 * len(self.choices), 4))
        panels = figure.subplots(1, len(self.choices), squeeze=False)[0]
        for choice, axes in zip(self.choices, panels, strict=True):
            places = {one.name: place for one in self.candidates if (place := _place(one, choice.target))}
            line = [places[name] for name in choice.front if name in places]
            axes.plot([x for x, _ in line], [y for _, y in line], color="#808080", linewidth=1)
            for name, (x, y) in places.items():
                axes.plot([x], [y], "o", color="#d62728" if name == choice.name else "#1f77b4")
                axes.annotate(name, (x, y), xytext=(4, 4), textcoords="offset points", fontsize=9)
            axes.set_xlabel(f"p50 ms on {choice.target}")
            axes.set_ylabel("foretold validation accuracy, %")
            axes.margins(x=0.2, y=0.1)
        figure.tight_layout()
        figure.savefig(path, format="svg", metadata={"Date": None})


def _row(one: Judged, target: str) -> str:
    row = one.on(target)
    speed = row.speed if row else None
    times = ("", "", "") if speed is None else (f"{speed.p50_ms:.3f}", _number(speed.p90_ms), _kib(speed.size_bytes))
    rungs = " ".join(f"{point.top1:.1%}" for point in one.rungs)
    foretold = f"{one.foretold.top1:.1%}" if one.foretold else ""
    alike = "" if one.affinity is None else f"{one.affinity:.2f}"
    known = (
        size_name(one.image_size) if one.image_size else "",
        f"{one.params:,}" if one.params else "",
        row.recipe if row else "",
    )
    told = (one.name, *known, *times, rungs, alike, foretold, one.fate)
    return f"| {' | '.join(told)} |"


def _told(one: Judged, target: str, front: tuple[str, ...]) -> CandidateRow:
    row = one.on(target)
    speed = row.speed if row else None
    figures = {name: getattr(speed, name, None) for name in ("p50_ms", "p90_ms", "size_bytes")}
    return CandidateRow(
        name=one.name,
        image_size=one.image_size,
        params=one.params,
        recipe=row.recipe if row else "",
        rungs=tuple(point.top1 for point in one.rungs),
        foretold=one.foretold.top1 if one.foretold else None,
        fate=one.fate.replace("**", ""),
        chosen=one.chosen,
        front=one.name in front,
        **figures,
    )


def _place(one: Judged, target: str) -> tuple[float, float] | None:
    row = one.on(target)
    if one.foretold is None or row is None or row.speed is None:
        return None
    return row.speed.p50_ms, 100 * one.foretold.top1


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _kib(size: int | None) -> str:
    return "" if size is None else f"{size / 1024:.0f}"
