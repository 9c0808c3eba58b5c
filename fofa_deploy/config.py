"""The plan: what is asked for, typed. A TOML file, or the name of an embedded plan, plus dotted overrides."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from fofa_deploy.errors import PlanError
from fofa_deploy.profile import is_path
from fofa_deploy.schema import expanded, read_tables, validate
from fofa_deploy.training import FEATURE_TERMS as FEATURE_TERMS
from fofa_deploy.training import LOGIT_TERMS as LOGIT_TERMS
from fofa_deploy.training import DistillPlan as DistillPlan
from fofa_deploy.training import FofaPlan as FofaPlan
from fofa_deploy.training import ModelPlan as ModelPlan
from fofa_deploy.training import QatPlan as QatPlan
from fofa_deploy.training import Size as Size
from fofa_deploy.training import TeacherPlan as TeacherPlan
from fofa_deploy.training import TrainPlan as TrainPlan
from fofa_deploy.training import WeightsPlan as WeightsPlan
from fofa_deploy.training import size_name as size_name
from fofa_deploy.types import Budget, Fraction, Frozen, InputForm

AUTO = "auto"
"""The student's model where it is to be chosen."""

Factor = Annotated[float, Field(ge=0.1, le=10.0)]


class DataPlan(Frozen):
    """Where the images are and what the network sees of them."""

    name: str = Field(
        description="'digits', 'idx', 'shards', 'images' (no labels), or any timm data set: 'folder', 'torch/cifar10', 'hfds/...'"
    )
    root: Path | None = None
    train_split: str = "train"
    test_split: str = "validation"
    validation_fraction: Annotated[float, Field(gt=0.0, lt=0.9)] = Field(default=0.1, description="held out of the training split")
    limit: PositiveInt | None = Field(default=None, description="use only this many training images, class-balanced")
    image_size: Size = Field(default=(224, 224), description="height, width; one number means a square")
    channels: Literal[1, 3] = 3
    mean: tuple[float, ...] = (0.5,)
    std: tuple[PositiveFloat, ...] = (0.5,)
    interpolation: Literal["bilinear", "bicubic", "nearest"] = "bilinear"
    crop_fraction: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    flip: bool = Field(default=False, description="horizontal flips while training")
    shift: NonNegativeInt = Field(default=0, description="random shifts by at most this many pixels while training")
    scale: Annotated[float, Field(gt=0.0, le=1.0)] = Field(default=1.0, description="smallest area of a random resized crop")
    class_names: tuple[str, ...] = Field(default=(), description="where the data set does not tell them")
    classes: PositiveInt | None = Field(default=None, description="of the model, where images come without labels")

    @property
    def labelled(self) -> bool:
        """Without labels nothing is trained, and artifacts are held to PyTorch alone."""
        return self.name != "images"

    def at(self, size: tuple[int, int] | None) -> Self:
        """The same images at another height and width, shifted as far of it; None: as it is."""
        if size is None or size == self.image_size:
            return self
        return self.model_copy(update={"image_size": size, "shift": round(self.shift * size[0] / self.image_size[0])})

    @model_validator(mode="after")
    def _one_per_channel(self) -> Self:
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, self.channels):
                raise ValueError(f"{name} takes 1 or {self.channels} numbers, one per channel, not {len(values)}")
        return self


class CandidatePlan(ModelPlan):
    """One line of the list: a model, or for timm a pattern such as 'timm:mobilenetv3_small_*'."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*$", max_length=100)] | None = Field(
        default=None, description="default: the model's own, with the input size"
    )
    widths: tuple[Factor, ...] = Field(
        default=(), exclude_if=lambda factors: not factors, description="times the model's channels, each a candidate of its own"
    )
    depths: tuple[Factor, ...] = Field(
        default=(), exclude_if=lambda factors: not factors, description="times its blocks; each depth with each width"
    )


class SelectPlan(Frozen):
    """How the student of ``student.model = "auto"`` is chosen; docs/selection.md."""

    candidates: tuple[CandidatePlan, ...] = Field(default=(), description="default: a list for the first target's kind of device")
    image_sizes: tuple[Size, ...] = Field(
        default=(),
        exclude_if=lambda sizes: not sizes,  # plans without it are what they were, and so are their stages' keys
        description="each a candidate of its own of every line that names no image_size; default: data.image_size",
    )
    fit: Literal["all", "each"] = Field(
        default="all",
        exclude_if=lambda fit: fit == "all",  # plans without it are what they were, and so are their stages' keys
        description="all: one student that keeps every target's budget; each: one is chosen for each target",
    )
    teacher: bool = Field(default=True, description="it is a candidate, too, and needs no training; not with fit = 'each'")
    rungs: Annotated[int, Field(ge=1, le=6)] = Field(default=3, description="short trainings; each is twice the one before")
    keep: Annotated[float, Field(gt=0.0, le=1.0)] = Field(default=0.5, description="share of the candidates that climbs on")
    first: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        default=1 / 16, description="the first rung's share of the whole training"
    )
    seconds: PositiveFloat = Field(default=1.0, description="least time that each candidate's latency is measured")


class ExportPlan(Frozen):
    """What the captured graph, and so every artifact, is given."""

    input: InputForm = Field(
        default="float32-nchw",
        description="uint8-nhwc: images as cameras and decoders give them, which the artifact itself normalizes",
    )

    def inputs(self) -> dict[str, str]:
        """What it adds to the keys of stages: nothing where it is the default, so that graphs of before are kept."""
        return {} if self.input == "float32-nchw" else {"input": self.input}


class AccuracyPlan(Frozen):
    """What an artifact must keep of the captured model, on the validation split."""

    max_top1_drop: Fraction = 0.01
    min_top1: Fraction = 0.0
    min_agreement: Fraction = Field(default=0.97, description="with PyTorch's top-1 class; judged where there are no labels")


class VerifyPlan(Frozen):
    samples: PositiveInt = Field(default=10_000, description="largest number of images per split that artifacts are run on")
    calibration: PositiveInt = Field(default=256, description="training images for post-training quantization")


class MeasurePlan(Frozen):
    seconds: PositiveFloat = Field(default=3.0, description="least time measured per artifact")
    max_seconds: PositiveFloat = Field(default=30.0, description="a percentile that needs longer is left out")
    warmup_seconds: PositiveFloat = 0.2
    warmup_runs: PositiveInt = 30


class GatePlan(Frozen):
    """What counts as a regression against a baseline; docs/gate.md tells how it is judged."""

    launches: Annotated[int, Field(ge=5, le=64)] = Field(
        default=8, description="fresh processes per look; more where many metrics are judged"
    )
    margin: Annotated[float, Field(ge=0.0, le=1.0)] = Field(default=0.02, description="a slowdown of the median that is none")
    max_slowdown: PositiveFloat = Field(
        default=0.03, description="a pass shows with 95 % confidence that it is not slower than this"
    )
    tail_margin: NonNegativeFloat = Field(default=0.1, description="of p90 and p99, between the binomial bounds")
    accuracy_margin: Fraction = Field(default=0.002, description="a loss of accuracy that is none, be it significant or not")
    max_size_increase: NonNegativeFloat | None = 0.1
    max_memory_increase: NonNegativeFloat | None = Field(default=0.2, description="of the peak of a process that holds the session")


Seconds = Annotated[float, Field(gt=0.0, le=1e9)]


class LimitsPlan(Frozen):
    """Of every child process."""

    build_seconds: Seconds = 1800.0
    run_seconds: Seconds = 1800.0
    memory_bytes: PositiveInt | None = None


class RunPlan(Frozen):
    """Everything that decides a run."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = 0
    threads: NonNegativeInt = Field(default=0, description="of training; 0 = every core this process may use")
    targets: tuple[str, ...] = Field(min_length=1, description="hardware profiles, by name or path")
    required: tuple[str, ...] = Field(default=(), description="targets without which the run is not a success")
    data: DataPlan
    teacher: TeacherPlan | None = None
    student: ModelPlan
    select: SelectPlan = SelectPlan()
    distill: DistillPlan | None = None
    qat: QatPlan = QatPlan()
    export: ExportPlan = ExportPlan()
    accuracy: AccuracyPlan = AccuracyPlan()
    budget: Budget = Budget()
    verify: VerifyPlan = VerifyPlan()
    measure: MeasurePlan = MeasurePlan()
    limits: LimitsPlan = LimitsPlan()
    gate: GatePlan = GatePlan()

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if problems := list(self._problems()):
            raise ValueError("; ".join(problems))
        return self

    def _problems(self) -> Iterable[str]:
        if self.student.model == AUTO and (self.distill is None or self.student != ModelPlan(model=AUTO)):
            yield "student.model = 'auto' needs a [distill] table, and nothing beside it in [student]"
        if self.distill is None and not self.student.has_weights:
            yield "the student has neither weights nor a [distill] table to train it by"
        if self.distill is not None and self.distill.method != "none" and self.teacher is None:
            yield f"method {self.distill.method!r} needs a [teacher]"
        if self.teacher is not None and not self.teacher.has_weights and self.teacher.fit is None:
            yield "the teacher has neither weights nor a [teacher.fit] table to train it by"
        if not self.data.labelled and not (self.data.classes or self.data.class_names):
            yield "images without labels do not tell the number of classes: set data.classes"
        if not self.data.labelled and (self.distill is not None or self.teacher is not None):
            yield "images without labels can verify a ready student, not train one: remove [teacher] and [distill]"
        if missing := [name for name in self.required if name not in self.targets]:
            yield f"required names targets that are not in targets: {', '.join(missing)}"


def embedded_plans() -> list[str]:
    """Names of the plans that ship with the package."""
    folder = resources.files("fofa_deploy") / "plans"
    return sorted(Path(entry.name).stem for entry in folder.iterdir() if entry.name.endswith(".toml"))


def _read_plan(source: str) -> tuple[dict[str, Any], Path]:
    if source in embedded_plans():
        with resources.as_file(resources.files("fofa_deploy") / "plans" / f"{source}.toml") as path:
            return read_tables(path), Path.cwd()
    path = Path(source)
    if not path.is_file():
        raise PlanError(f"there is no plan {source!r}", f"give a TOML file, or one of: {', '.join(embedded_plans())}")
    return _tables(path), path.parent.absolute()


def _tables(path: Path) -> dict[str, Any]:
    """A TOML file, or the resolved plan of a run directory, which is JSON."""
    if path.suffix != ".json":
        return read_tables(path)
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise PlanError(f"{path} is not JSON: {error}", "take the plan.json of a run directory, or write a TOML file") from error
    return found if isinstance(found, dict) else {}


def _parse_value(text: str) -> Any:  # noqa: ANN401 - a TOML value is any scalar, list or table
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        return text


def override(data: dict[str, Any], assignment: str) -> None:
    """Apply ``a.b=c`` to nested tables in place; ``c`` is a TOML value, or else a string.

    Raises:
        PlanError: no ``=``, or the path runs through something that is not a table.
    """
    dotted, sign, value = assignment.partition("=")
    *parents, leaf = dotted.strip().split(".")
    if not sign or not leaf:
        raise PlanError(f"cannot read the override {assignment!r}", "write it as --set distill.epochs=20")
    table: Any = data
    for part in parents:
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise PlanError(f"--set {assignment}: {part!r} is not a table", "name a table's key, such as distill.epochs")
    table[leaf] = _parse_value(value.strip())


def _anchor(data: dict[str, Any], folder: Path) -> None:
    """Make the plan's relative paths absolute: a plan means the same wherever it is run from."""
    for table, key in (("data", "root"), ("teacher", "checkpoint"), ("student", "checkpoint")):
        section = data.get(table)
        if isinstance(section, dict) and isinstance(section.get(key), str):
            section[key] = _anchored(section[key], folder)
    candidates = data["select"].get("candidates") if isinstance(data.get("select"), dict) else None
    for line in candidates if isinstance(candidates, list) else ():
        if isinstance(line, dict) and isinstance(line.get("checkpoint"), str):
            line["checkpoint"] = _anchored(line["checkpoint"], folder)
    for key in ("targets", "required"):
        if isinstance(data.get(key), list):
            data[key] = [_anchored(n, folder) if isinstance(n, str) and is_path(n) else n for n in data[key]]


def _anchored(path: str, folder: Path) -> str:
    return str(folder / expanded(path))


def load_plan(source: str, overrides: Iterable[str] = ()) -> RunPlan:
    """Read a plan by embedded name or path and apply overrides (whose paths are relative to the working directory).

    Raises:
        PlanError: every mistake at once, each with the nearest valid name.
    """
    data, folder = _read_plan(source)
    _anchor(data, folder)
    assignments = list(overrides)
    for assignment in assignments:
        override(data, assignment)
    _anchor(data, Path.cwd())
    return validate(data, RunPlan, f"{source} or --set" if assignments else source)


def ready_made(checkpoint: Path, model: str, classes: int, images: Path, overrides: Iterable[str] = ()) -> RunPlan:
    """The plan of a model that needs no training, with unlabelled images to hold its artifacts to."""
    data: dict[str, Any] = {
        "name": "ready-made",
        "targets": ["cpu-onnxruntime"],
        "data": {"name": "images", "root": str(images.absolute()), "classes": classes},
        "student": {"model": model, "checkpoint": str(checkpoint.absolute())},
    }
    for assignment in overrides:
        override(data, assignment)
    _anchor(data, Path.cwd())
    return validate(data, RunPlan, "the command line")
