"""What is compared: pairs of families, methods, the forms of feedback, and the settings that each may choose from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from fofa_deploy.config import DataPlan, DistillPlan, ModelPlan, TeacherPlan, TrainPlan

Settings = dict[str, Any]
CNN_TAPS = ("stages.0", "stages.1", "stages.2")


@dataclass(frozen=True)
class Pair:
    teacher: str
    student: str

    @property
    def name(self) -> str:
        return f"{self.teacher} -> {self.student}"


PAIRS = (Pair("cnn", "vit"), Pair("mixer", "cnn"), Pair("cnn", "mixer"), Pair("hybrid", "cnn"))
TEACHER_TAPS = {"cnn": CNN_TAPS, "hybrid": ("stem.0", "stem.1", "blocks.0", "blocks.2"), "mixer": ()}
STUDENT_TAPS = {"cnn": CNN_TAPS, "vit": (), "mixer": ()}


@dataclass(frozen=True)
class Regime:
    """How many training images a student sees, and how often. Teachers always see all of them.

    Args:
        epochs: of each student.
        settled: the regime whose learning rates and tuned settings hold; None for one with its own.
    """

    name: str
    limit: int | None
    epochs: Mapping[str, int]
    teacher_epochs: int = 5
    settled: str | None = None

    def of(self, epochs: int) -> Regime:
        """The same with another number of epochs, one for all."""
        return replace(self, epochs=dict.fromkeys(self.epochs, epochs))

    def glimpse(self, epochs: int) -> Regime:
        """A short one of its own, with the settings of this one."""
        return replace(self.of(epochs), name=f"{self.name}-quick", settled=self.settled or self.name)

    @property
    def described(self) -> str:
        """For titles."""
        images = f"{self.limit:,} images" if self.limit else "all training images"
        if len(set(self.epochs.values())) == 1:
            return f"{images}, {min(self.epochs.values())} epochs"
        return f"{images}, epochs: {', '.join(f'{student} {epochs}' for student, epochs in self.epochs.items())}"


_REGIMES = (
    Regime("small", 10_000, {"cnn": 24, "vit": 24, "mixer": 24}),
    Regime("long", 10_000, {"cnn": 64, "vit": 192, "mixer": 192}, teacher_epochs=20, settled="small"),
    Regime("full", None, {"cnn": 8, "vit": 8, "mixer": 8}, teacher_epochs=20, settled="small"),
)
REGIMES = {regime.name: regime for regime in _REGIMES}
"""A short budget, one with which twice as many epochs bring a student little more, and more images."""


@dataclass(frozen=True)
class Method:
    """A name, the plan that goes with it, and the settings that tuning may choose from."""

    name: str
    plan: Settings
    choices: tuple[Settings, ...] = field(default=({},))
    length: str = ""
    """The schedule; or ``TWICE`` as many epochs; or ``EQUAL``: for as many seconds as the default plan, not for as many steps."""

    @property
    def tuned_as(self) -> str:
        return self.name.removesuffix(self.length)

    def of(self, length: str) -> Method:
        return replace(self, name=f"{self.name}{length}", length=length)


DEFAULT, UNPROMPTED, TO_THE_END = "FOFA (default)", "FOFA without prompts", "FOFA, features to the end"
UNFED = "no feedback"
"""What forms of feedback are compared with."""
TWICE, EQUAL = ", twice the epochs", ", equal compute"

OFTEN, SELDOM = 20, 40
"""Steps from one measurement of the balance to the next; the default's has become the second."""
THROUGHOUT = {"features_until": 1.0}
"""As every method was published: features teach to the last epoch."""
FOFA = {"width": 64, "heads": 4, "stages": 4, "prompted_stages": []}
FAITHFUL = {"feedback": True, "prompt_share": 1.0}
ALL = {**FAITHFUL, "prompted_stages": [1, 2, 3, 4]}
LATE = {**FAITHFUL, "prompted_stages": [3]}
BLIND = {**LATE, "feedback": False}
HALF = {**BLIND, "prompt_share": 0.5}


def _weights(name: str, *values: float) -> tuple[Settings, ...]:
    return tuple({"weights": {name: value}} for value in values)


def _fofa(name: str, **settings: Any) -> Method:  # noqa: ANN401 - fields of a plan
    """A form of FOFA; without prompts unless ``fofa`` names stages for them."""
    fofa = {**FOFA, **settings.pop("fofa", {})}
    if fofa["prompted_stages"]:
        settings["weights"] = {"regularizer": 1.0, **settings.get("weights", {})}
    return Method(name, {"method": "fofa+rsd+dist", "balance_every": OFTEN, **THROUGHOUT, "fofa": fofa, **settings})


def _default(name: str, **settings: Any) -> Method:  # noqa: ANN401 - fields of a plan
    """A form of the default plan, which with these networks, whose last of three stages is the third, comes to this."""
    fofa = {**BLIND, **settings.pop("fofa", {})}
    usual = {"balance_every": SELDOM, "features_until": 0.5, "weights": {"regularizer": 8.0}}
    return _fofa(name, **{"fofa": fofa, **usual, **settings})


DEFAULTS = (
    {"method": "fofa+rsd", "temperature": 1.0},
    {"method": "fofa+rsd+dist", "temperature": 1.0},
    {"method": "fofa+rsd+dist", "temperature": 2.0},
)
TEMPERATURES = tuple({"temperature": value} for value in (1.0, 2.0, 4.0))
ALONE = Method("alone", {"method": "none"})
RATES = replace(ALONE, choices=tuple({"lr": value} for value in (1e-3, 2e-3, 4e-3, 8e-3, 16e-3, 32e-3, 64e-3)))
"""Tried first: whatever suits a student alone is the learning rate of every method that teaches it."""

METHODS = (
    replace(ALONE, choices=tuple({"label_smoothing": value} for value in (0.0, 0.05, 0.1))),
    Method("KD", {"method": "kd", "balance": "fixed"}, TEMPERATURES),
    Method("DKD", {"method": "dkd", "balance": "fixed", "dkd_beta": 2.0}, ({"temperature": 0.5}, *TEMPERATURES)),
    Method("DIST", {"method": "dist", "balance": "fixed"}, TEMPERATURES),
    Method("FitNet", {"method": "fitnet", "balance": "fixed", **THROUGHOUT}, _weights("fitnet", 0.1, 1.0, 10.0)),
    Method("OFA", {"method": "ofa", "balance": "fixed"}, tuple({"ofa_gamma": value} for value in (1.0, 1.5, 2.0, 3.0))),
    Method("RSD", {"method": "rsd", "balance": "fixed", **THROUGHOUT}, _weights("rsd", 0.5, 1.0, 2.0, 4.0, 8.0)),
    replace(_fofa(UNPROMPTED), choices=DEFAULTS),
    _default(DEFAULT),
)
"""The table. Every method has three settings to choose from, more where the best was the last one, and one for all pairs.
The default has those of the row before it; which prompts it has, for how long features teach and how often the balance is
measured was chosen among `FORMS` and `ENDS`, on validation images as well."""

TRIED = (
    replace(
        _fofa(f"{UNPROMPTED}, all of its terms weighed"),
        choices=tuple({"weights": {"fofa": value, "rsd": value, "dist": value}} for value in (1 / 3, 2.0)),
    ),
)
"""Tuned for the record: less teacher is worse, more within noise. The weights stay 1."""

TIMED = tuple(method for method in METHODS if method.name in ("alone", "KD", "RSD"))
PACED = (*TIMED, METHODS[-1])
LONGER = (METHODS[0].of(TWICE), *(method.of(EQUAL) for method in TIMED))
"""At their tuned settings. What they gain by it is what a dearer method has to be worth."""

FORMS = (
    _fofa("no feedback, fixed weights", balance="fixed"),
    _fofa(UNFED),
    _fofa("regions: hard ones count for more", fofa={"emphasis": "regions"}),
    _fofa("regions: hard ones count for less", fofa={"emphasis": "regions", "emphasis_power": -0.5}),
    _fofa("channels: hard ones count for more", fofa={"emphasis": "channels"}),
    _fofa("channels: hard ones count for less", fofa={"emphasis": "channels", "emphasis_power": -0.5}),
    _fofa("samples: hard ones count for more", fofa={"emphasis": "samples"}),
    _fofa("prompts as published", fofa={**ALL, "fusion": "dense"}),
    _fofa("late prompt with a feature anchor", fofa=LATE, weights={"anchor": 1.0}),
    _fofa("late prompt, trained by labels, blind to L_FD", fofa={**LATE, "follow": 0.0}, weights={"supervision": 1.0}),
    _fofa("late prompt without the gap", fofa=BLIND),
    _fofa("late prompt without the gap, gamma = 4", fofa=BLIND, weights={"regularizer": 4.0}),
    _fofa("late prompt without the gap, on half of the batch", fofa=HALF),
    _fofa("no feedback, balance measured half as often", balance_every=SELDOM),
    _default("late prompt without the gap, gamma = 4, balance half as often", **THROUGHOUT, weights={"regularizer": 4.0}),
    _default("late prompt without the gap, gamma = 8, balance half as often", **THROUGHOUT),
    _fofa("late prompt without the gap, with an anchor", fofa=BLIND, weights={"anchor": 1.0}),
    _fofa("late prompt without the gap, with the labels' loss", fofa=BLIND, weights={"supervision": 1.0}),
    _fofa("side prompts", fofa={**ALL, "path": "side"}),
    _fofa("prompts in every stage", fofa=ALL),
    _fofa("prompts in every stage, no regularizer", fofa=ALL, weights={"regularizer": 0.0}),
)
"""Forms of adaptive feedback, screened on validation images alone."""

SCREENED = (PAIRS[0], PAIRS[2])
"""The pairs whose students gained most by the default plan when it was tuned."""

ENDS = tuple(_default(f"features until {share:g}", features_until=share) for share in (0.5, 0.75, 1.0))
"""How long features teach, screened on validation images and on all pairs."""

SWITCHES = (
    _default("default"),
    _default("no prompt", fofa={"prompted_stages": []}),
    _default("prompt in the last stage", fofa=LATE),
    _default("prompts in every stage", fofa=ALL),
    _default("prompts from stage 2", fofa={**ALL, "prompted_stages": [2, 3]}),
    _default("prompts on every 4th step", fofa={**ALL, "prompt_every": 4}),
    _default("prompts on a quarter of the batch", fofa={**ALL, "prompt_share": 0.25}),
    _default("prompts beside the teacher", fofa={**ALL, "path": "side"}),
    _default("prompts on every 2nd step", fofa={**ALL, "prompt_every": 2}),
    _default("prompts on half of the batch", fofa={**ALL, "prompt_share": 0.5}),
)
"""What makes prompts cheaper, in a plan that is the default's in all else, screened on validation images; but for the default's
own, they see the gap. Nothing can be bent before these teachers' first stage: from stage 2 on is all of them, and comes to the
same to the last digit. What each costs is the matter of benchmarks/distill-cost."""

CELLS = tuple(_default(f"{cells} x {cells} cells of a region", fofa={"cells": cells}) for cells in (1, 2, 4))
"""How finely regions are seen, screened on validation images. The last one is all there is to see of these students."""

FINE = tuple(pair for pair in PAIRS if pair.student == "cnn")
"""Maps of the other students have as many cells as regions."""

ABLATIONS = (
    _default(TO_THE_END, **THROUGHOUT),
    _fofa("FOFA, gamma = 1, balance twice as often", fofa=BLIND),
    _default("FOFA without prompts, features in the first half", fofa={"prompted_stages": []}),
    _default("FOFA without attention", fofa={"attention": False}),
    _default("FOFA without the regularizer", weights={"regularizer": 0.0}),
    _default("FOFA without standardized targets", fofa={"standardize": False}),
    _default("FOFA without RSD", method="fofa+dist"),
    _default("FOFA with KD for DIST", method="fofa+rsd"),
    Method("FOFA without features", {"method": "rsd+dist", "features_until": 0.5}),
    _default("FOFA with fixed weights", balance="fixed"),
)

RIVALS = (
    Method("RSD with balanced weights", {"method": "rsd", "balance_every": SELDOM, **THROUGHOUT}),
    Method("DIST with balanced weights", {"method": "dist", "balance_every": SELDOM, "temperature": 2.0}),
    Method("KD, temperature 1", {"method": "kd", "balance": "fixed", "temperature": 1.0}),
    Method("DIST, temperature 4", {"method": "dist", "balance": "fixed", "temperature": 4.0}),
    Method("FitNet, weight 0.1", {"method": "fitnet", "balance": "fixed", **THROUGHOUT, "weights": {"fitnet": 0.1}}),
)
"""What others might be with the default's balance, and with the settings that the repeated tuning would choose."""

COMPARED = (*METHODS, *LONGER, *ABLATIONS, *RIVALS)

NOTES = {
    UNPROMPTED: (
        f"{UNPROMPTED!r} is the form that was tuned: features to the end, the balance measured twice as often. What a prompt is",
        f"worth by itself, the row {UNPROMPTED + ', features in the first half'!r} tells.",
    ),
    "FOFA without features": ("'FOFA without features' keeps RSD, and lacks the maps that attention blends.",),
}
"""What a name does not say."""


def data(root: str, limit: int | None) -> DataPlan:
    return DataPlan.model_validate(
        {
            "name": "idx", "root": root, "limit": limit, "image_size": 16, "channels": 1,
            "mean": (0.286,), "std": (0.33,), "flip": True, "shift": 1,
        }
    )  # fmt: skip


def teacher(kind: str, epochs: int) -> TeacherPlan:
    fit = TrainPlan(epochs=epochs, batch_size=128, lr=2e-3, warmup_epochs=0.5, channels_last=True)
    return TeacherPlan(model=f"models:{kind}_teacher", taps=TEACHER_TAPS[kind], floor_top1=0.85, fit=fit)


def student(kind: str) -> ModelPlan:
    return ModelPlan(model=f"models:{kind}_student", taps=STUDENT_TAPS[kind])


def plan(settings: Settings, epochs: int) -> DistillPlan:
    common = {"batch_size": 128, "warmup_epochs": 1.0, "channels_last": True, "checkpoint_seconds": 600.0}
    return DistillPlan.model_validate({**common, "epochs": epochs, **settings})
