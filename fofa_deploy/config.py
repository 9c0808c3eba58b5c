"""The plan: what is asked for, typed. A TOML file, or the name of an embedded plan, plus dotted overrides."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, field_validator, model_validator

from fofa_deploy.errors import PlanError
from fofa_deploy.profile import is_path
from fofa_deploy.schema import read_tables, validate
from fofa_deploy.types import Budget, Fraction, Frozen, Scalar

Side = Annotated[int, Field(ge=4, le=4096)]


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
    image_size: tuple[Side, Side] = Field(default=(224, 224), description="height, width; one number means a square")
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

    @field_validator("image_size", mode="before")
    @classmethod
    def _square(cls, value: object) -> object:
        if isinstance(value, int):
            return value, value
        return tuple(value) if isinstance(value, list) else value  # strict mode takes no list from Python

    @model_validator(mode="after")
    def _one_per_channel(self) -> Self:
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, self.channels):
                raise ValueError(f"{name} takes 1 or {self.channels} numbers, one per channel, not {len(values)}")
        return self


class ModelPlan(Frozen):
    """One network."""

    model: str = Field(description="'timm:NAME' or 'package.module:function'")
    arguments: dict[str, Scalar | list[Scalar]] = Field(default={}, description="passed on to the constructor")
    checkpoint: Path | None = Field(default=None, description="safetensors, or a .pt of plain tensors; loaded strictly")
    pretrained: bool = Field(default=False, description="timm's own weights, from its hub")
    taps: tuple[str, ...] = Field(default=(), description="module names to take features from; timm models declare their own")
    prune: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        default=0.0,
        exclude_if=lambda share: share == 0,  # plans without it are what they were, and so are their stages' keys
        description="share of channels taken out of every layer, the weakest first, before training; docs/compression.md",
    )

    @property
    def has_weights(self) -> bool:
        return self.pretrained or self.checkpoint is not None


class TrainPlan(Frozen):
    """One training: AdamW, linear warm-up, cosine decay."""

    epochs: PositiveInt = 30
    batch_size: PositiveInt = Field(default=128, description="images per optimizer step, over all processes")
    lr: PositiveFloat = 1e-3
    weight_decay: NonNegativeFloat = 0.05
    warmup_epochs: NonNegativeFloat = 1.0
    label_smoothing: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    clip_norm: PositiveFloat = 5.0
    ema: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(default=0.0, description="decay of the averaged weights; 0 = off")
    precision: Literal["fp32", "bf16", "fp16"] = Field(default="fp32", description="of autocast while training")
    channels_last: bool = False
    accumulate: PositiveInt = Field(default=1, description="passes that share a batch, one after another, to save memory")
    compile: bool = Field(default=False, description="teacher and student by torch.compile; needs a C++ compiler on a CPU")
    shard_teacher: bool = Field(default=False, description="spread the teacher's weights over the processes (FSDP)")
    trackers: tuple[Literal["tensorboard", "mlflow", "wandb"], ...] = Field(default=(), description="where curves go, too")
    workers: NonNegativeInt = Field(default=0, description="data loader processes, per training process")
    checkpoint_seconds: PositiveFloat = Field(default=60.0, description="longest time that a kill can cost")

    def decisive(self) -> dict[str, Any]:
        """The fields that decide a result, and so a stage's key."""
        return self.model_dump(exclude={"shard_teacher", "trackers", "workers", "checkpoint_seconds"})


class TeacherPlan(ModelPlan):
    floor_top1: Fraction | None = Field(default=None, description="least validation accuracy; default: 3x chance, at most 0.9")
    fit: TrainPlan | None = Field(default=None, description="train it first, when it comes without weights")

    def decisive(self) -> dict[str, Any]:
        """The fields that decide the weights."""
        return {**self.model_dump(exclude={"floor_top1", "fit"}), "fit": self.fit and self.fit.decisive()}


class FofaPlan(Frozen):
    """Feature-based one-for-all distillation (arXiv 2501.08885); the symbols are the paper's.

    Prompts are off unless stages are named for them: docs/method.md says what they were measured to cost and to bring.
    """

    stages: PositiveInt = Field(default=4, description="depths at which features are compared")
    regions: PositiveInt = Field(default=16, description="n, regions per stage; a square number")
    width: PositiveInt = Field(default=512, description="d, width of region-aware attention")
    heads: PositiveInt = 8
    attention: bool = Field(default=True, description="regions of all stages attend to each other; off: each stage for itself")
    standardize: bool = Field(default=True, description="teacher features scaled per stage and channel by plain-teacher statistics")
    emphasis: Literal["none", "regions", "channels", "samples"] = Field(
        default="none", description="feedback without prompts: what the student finds hard counts for more"
    )
    emphasis_power: float = Field(default=0.5, description="of the error that weighs; below 0 what is hard counts for less")
    prompted_stages: tuple[PositiveInt, ...] = Field(default=(), description="teacher stages with a prompt before them")
    feedback: bool = Field(default=True, description="prompts see the gap between student and plain teacher")
    fusion: Literal["dense", "depthwise"] = Field(default="depthwise", description="of gap and features; dense is the paper's")
    path: Literal["teacher", "side"] = Field(
        default="teacher", description="prompts bend what enters a teacher stage, or (side) the target alone, at no second pass"
    )
    prompt_every: PositiveInt = Field(default=1, description="the prompted pass runs on every k-th step")
    prompt_share: Annotated[float, Field(gt=0.0, le=1.0)] = Field(default=1.0, description="share of a batch in the prompted pass")
    follow: NonNegativeFloat = Field(default=1.0, description="share of the feature loss' gradient that reaches the prompts")

    @model_validator(mode="after")
    def _shapes(self) -> Self:
        if round(self.regions**0.5) ** 2 != self.regions:
            raise ValueError(f"regions must be a square number such as 4, 9 or 16, not {self.regions}")
        if self.width % self.heads:
            raise ValueError(f"width ({self.width}) must be a multiple of heads ({self.heads})")
        if any(stage > self.stages for stage in self.prompted_stages):
            raise ValueError(f"prompted_stages must lie between 1 and stages ({self.stages})")
        return self


class WeightsPlan(Frozen):
    """Factors of the loss terms; the papers' are all 1. Balancing, where it is on, comes on top."""

    ce: NonNegativeFloat = 1.0
    kd: NonNegativeFloat = Field(default=1.0, description="alpha")
    dkd: NonNegativeFloat = 1.0
    dist: NonNegativeFloat = 1.0
    fitnet: NonNegativeFloat = 1.0
    ofa: NonNegativeFloat = 1.0
    fofa: NonNegativeFloat = Field(default=1.0, description="beta")
    rsd: NonNegativeFloat = 1.0
    regularizer: NonNegativeFloat = Field(default=1.0, description="gamma: holds the prompted teacher's logits to the plain one's")
    anchor: NonNegativeFloat = Field(default=0.0, description="holds its features to the plain one's")
    supervision: NonNegativeFloat = Field(default=0.0, description="cross-entropy of the prompted teacher")


LOGIT_TERMS = ("kd", "dkd", "dist", "ofa")
FEATURE_TERMS = ("fofa", "rsd", "fitnet")


class DistillPlan(TrainPlan):
    method: str = Field(
        default="fofa+rsd",
        description="'none', or a sum of kd, dkd, dist, ofa, fofa, rsd, fitnet; kd is added where none of the first four is named",
    )
    balance: Literal["gradient", "fixed"] = Field(
        default="gradient", description="terms scaled to equal gradients at the student, before their weights; or weights alone"
    )
    temperature: PositiveFloat = Field(default=1.0, description="of kd, dkd and dist")
    dkd_beta: NonNegativeFloat = Field(default=8.0, description="weight of DKD's non-target part; the target part has 1")
    ofa_gamma: PositiveFloat = Field(default=1.5, description="exponent by which OFA enhances the target class")
    rsd_lambda: NonNegativeFloat = Field(default=0.05, description="weight of RSD's off-diagonal correlations")
    weights: WeightsPlan = WeightsPlan()
    fofa: FofaPlan = FofaPlan()

    @property
    def terms(self) -> tuple[str, ...]:
        """What is learned from the teacher, by name; empty for method ``none``."""
        parts = [part.strip() for part in self.method.split("+") if part.strip() != "none"]
        if parts and not set(parts) & set(LOGIT_TERMS):
            parts.insert(0, "kd")
        return tuple(dict.fromkeys(parts))

    @field_validator("method")
    @classmethod
    def _known(cls, value: str) -> str:
        known = (*LOGIT_TERMS, *FEATURE_TERMS)
        unknown = [part.strip() for part in value.split("+") if part.strip() not in known]
        if value != "none" and unknown:
            raise ValueError(
                f"unknown method {', '.join(map(repr, unknown))}; known: none, {', '.join(known)}, and sums such as fofa+rsd"
            )
        return value


class QatPlan(Frozen):
    """Quantization-aware training of the student; docs/quantization.md. What is not said here is as in [distill]."""

    when: Literal["never", "needed", "always"] = Field(
        default="needed", description="needed: a target's int8 recipes all miss the accuracy budget"
    )
    epochs: PositiveInt = 3
    lr: PositiveFloat | None = Field(default=None, description="default: a tenth of distill.lr")
    weight_bits: Literal[7, 8] = Field(default=7, description="7 also suits CPUs whose int8 products saturate")


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


class LimitsPlan(Frozen):
    """Of every child process."""

    build_seconds: PositiveFloat = 1800.0
    run_seconds: PositiveFloat = 1800.0
    memory_bytes: PositiveInt | None = None


class RunPlan(Frozen):
    """Everything that decides a run."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    seed: NonNegativeInt = 0
    threads: NonNegativeInt = Field(default=0, description="of training; 0 = every core this process may use")
    targets: tuple[str, ...] = Field(min_length=1, description="hardware profiles, by name or path")
    required: tuple[str, ...] = Field(default=(), description="targets without which the run is not a success")
    data: DataPlan
    teacher: TeacherPlan | None = None
    student: ModelPlan
    distill: DistillPlan | None = None
    qat: QatPlan = QatPlan()
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
    except ValueError as error:
        raise PlanError(f"{path} is not JSON: {error}", "take the plan.json of a run directory, or write a TOML file") from error
    return found if isinstance(found, dict) else {}


def _parse_value(text: str) -> Any:  # noqa: ANN401 - a TOML value is any scalar, list or table
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except ValueError:
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
    for key in ("targets", "required"):
        if isinstance(data.get(key), list):
            data[key] = [_anchored(n, folder) if isinstance(n, str) and is_path(n) else n for n in data[key]]


def _anchored(path: str, folder: Path) -> str:
    return str(folder / Path(path).expanduser())


def load_plan(source: str, overrides: Iterable[str] = ()) -> RunPlan:
    """Read a plan by embedded name or path and apply overrides (whose paths are relative to the working directory).

    Raises:
        PlanError: every mistake at once, each with the nearest valid name.
    """
    data, folder = _read_plan(source)
    _anchor(data, folder)
    for assignment in overrides:
        override(data, assignment)
    _anchor(data, Path.cwd())
    return validate(data, RunPlan, source)


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
