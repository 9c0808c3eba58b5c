"""The tables of a plan that say what is trained, and how: models, schedules, methods and their weights."""

from __future__ import annotations

from operator import attrgetter
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BeforeValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from fofa_deploy.types import Fraction, Frozen, Scalar

Side = Annotated[int, Field(ge=4, le=4096)]


def _square(value: object) -> object:
    if isinstance(value, int):
        return value, value
    return tuple(value) if isinstance(value, list) else value  # strict mode takes no list from Python


Size = Annotated[tuple[Side, Side], BeforeValidator(_square)]
"""Height and width in pixels; one number means a square."""


def size_name(size: tuple[int, int]) -> str:
    """As names of candidates and folders end: ``96``, or ``96x128`` where height and width differ."""
    return str(size[0]) if size[0] == size[1] else f"{size[0]}x{size[1]}"


class ModelPlan(Frozen):
    """One network."""

    model: str = Field(description="'timm:NAME' or 'package.module:function'")
    arguments: dict[str, Scalar | list[Scalar]] = Field(default={}, description="passed on to the constructor")
    checkpoint: Path | None = Field(default=None, description="safetensors, or a .pt of plain tensors; loaded strictly")
    pretrained: bool = Field(default=False, description="timm's own weights, from its hub")
    image_size: Size | None = Field(
        default=None,
        exclude_if=lambda size: size is None,  # plans without it are what they were, and so are their stages' keys
        description="height, width that it works at; default: data.image_size",
    )
    taps: tuple[str, ...] = Field(default=(), description="module names to take features from; timm models declare their own")
    prune: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        default=0.0,
        exclude_if=lambda share: share == 0,  # plans without it are what they were, and so are their stages' keys
        description="share of channels taken out of every layer, the weakest first, before training; docs/compression.md",
    )

    @property
    def has_weights(self) -> bool:
        return self.pretrained or self.checkpoint is not None


MANNER = frozenset({"shard_teacher", "trackers", "workers", "checkpoint_seconds"})
"""Keys of a training that decide how it gets on, and nothing of what comes out."""


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

    @model_validator(mode="after")
    def _warm(self) -> Self:
        if self.warmup_epochs > self.epochs:
            raise ValueError(f"warmup_epochs ({self.warmup_epochs:g}) must not exceed epochs ({self.epochs})")
        return self

    def decisive(self) -> dict[str, Any]:
        """The fields that decide a result, and so a stage's key."""
        return self.model_dump(exclude=set(MANNER))


class TeacherPlan(ModelPlan):
    floor_top1: Fraction | None = Field(
        default=None, description="least validation accuracy; default: 3x chance, at most half-way from chance to 1"
    )
    fit: TrainPlan | None = Field(default=None, description="train it first, from the weights it comes with, if any")

    def decisive(self) -> dict[str, Any]:
        """The fields that decide the weights."""
        return {**self.model_dump(exclude={"floor_top1", "fit"}), "fit": self.fit and self.fit.decisive()}


class FofaPlan(Frozen):
    """Feature-based one-for-all distillation (arXiv 2501.08885); the symbols are the paper's.

    The default is not the published form, which has prompts in all stages, fed with the gap: docs/method.md says what each
    was measured to cost and to bring.
    """

    stages: PositiveInt = Field(default=4, description="depths at which features are compared")
    regions: PositiveInt = Field(default=16, description="n, regions per stage; a square number")
    cells: PositiveInt = Field(
        default=4,
        exclude_if=lambda cells: cells == 4,  # plans without it are what they were, and so are their stages' keys
        description="cells of a region, to a side, that are told apart; a finer map is averaged to as many",
    )
    width: PositiveInt = Field(default=512, description="d, width of region-aware attention")
    heads: PositiveInt = 8
    attention: bool = Field(default=True, description="regions of all stages attend to each other; off: each stage for itself")
    standardize: bool = Field(default=True, description="teacher features scaled per stage and channel by plain-teacher statistics")
    emphasis: Literal["none", "regions", "channels", "samples"] = Field(
        default="none", description="feedback without prompts: what the student finds hard counts for more"
    )
    emphasis_power: Annotated[float, Field(ge=-1.0, le=1.0)] = Field(
        default=0.5, description="of the error that weighs; below 0 what is hard counts for less"
    )
    prompted_stages: tuple[int, ...] = Field(
        default=(-1,), description="teacher stages with a prompt before them; -1 is the last one, whatever their number"
    )
    feedback: bool = Field(default=False, description="prompts see the gap between student and plain teacher")
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
        if any(not 1 <= abs(stage) <= self.stages for stage in self.prompted_stages):
            raise ValueError(f"prompted_stages must lie between 1 and stages ({self.stages}), or count back from -1")
        return self


class WeightsPlan(Frozen):
    """Factors of the loss terms; the papers' are all 1. Balancing, where it is on, comes on top.

    The last three are the prompts' alone, and never balanced.
    """

    ce: NonNegativeFloat = 1.0
    kd: NonNegativeFloat = Field(default=1.0, description="alpha")
    dkd: NonNegativeFloat = 1.0
    dist: NonNegativeFloat = 1.0
    fitnet: NonNegativeFloat = 1.0
    ofa: NonNegativeFloat = 1.0
    fofa: NonNegativeFloat = Field(default=1.0, description="beta")
    rsd: NonNegativeFloat = 1.0
    regularizer: NonNegativeFloat = Field(default=8.0, description="gamma: holds the prompted teacher's logits to the plain one's")
    anchor: NonNegativeFloat = Field(default=0.0, description="holds its features to the plain one's")
    supervision: NonNegativeFloat = Field(default=0.0, description="cross-entropy of the prompted teacher")


LOGIT_TERMS = ("kd", "dkd", "dist", "ofa")
FEATURE_TERMS = ("fofa", "rsd", "fitnet")
MAP_TERMS = ("fofa", "fitnet", "ofa")
"""Those that look at maps between a network's stages; the others do with logits, or with what enters the classifier."""

_USED_BY = {
    "temperature": ("kd", "dkd", "dist"),
    "dkd_beta": ("dkd",),
    "ofa_gamma": ("ofa",),
    "rsd_lambda": ("rsd",),
    "features_until": FEATURE_TERMS,
    "fofa.stages": MAP_TERMS,
    **{f"weights.{term}": (term,) for term in (*LOGIT_TERMS, *FEATURE_TERMS)},
}
"""Terms without which a key of `DistillPlan` does nothing; other keys of fofa are its own."""

_PROMPTS = ("feedback", "fusion", "path", "prompt_every", "prompt_share", "follow")
_PROMPTED = (*(f"fofa.{key}" for key in _PROMPTS), "weights.regularizer", "weights.anchor", "weights.supervision")
"""Keys that do nothing where no stage is prompted."""


class DistillPlan(TrainPlan):
    method: str = Field(
        default="fofa+rsd+dist",
        description="'none', or a sum of kd, dkd, dist, ofa, fofa, rsd, fitnet; kd is added where none of the first four is named",
    )
    balance: Literal["gradient", "fixed"] = Field(
        default="gradient", description="terms scaled to equal gradients at the student, before their weights; or weights alone"
    )
    features_until: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        default=0.5, description="share of the epochs in which fofa, rsd and fitnet teach; predictions teach to the end"
    )
    balance_every: PositiveInt = Field(default=40, description="steps from one measurement of the gradients to the next")
    temperature: PositiveFloat = Field(default=1.0, description="of kd, dkd and dist")
    dkd_beta: NonNegativeFloat = Field(default=8.0, description="weight of DKD's non-target part; the target part has 1")
    ofa_gamma: PositiveFloat = Field(default=1.5, description="exponent by which OFA enhances the target class")
    rsd_lambda: NonNegativeFloat = Field(default=0.05, description="weight of RSD's off-diagonal correlations")
    weights: WeightsPlan = WeightsPlan()
    fofa: FofaPlan = FofaPlan()

    @property
    def compares_maps(self) -> bool:
        """Whether a term takes features from inside of the networks."""
        return not set(self.terms).isdisjoint(MAP_TERMS)

    @property
    def terms(self) -> tuple[str, ...]:
        """What is learned from the teacher, by name; empty for method ``none``."""
        parts = [part.strip() for part in self.method.split("+") if part.strip() != "none"]
        if parts and not set(parts) & set(LOGIT_TERMS):
            parts.insert(0, "kd")
        return tuple(dict.fromkeys(parts))

    @property
    def idle(self) -> dict[str, str]:
        """Keys that differ from their default and do nothing, each with why."""
        used, method = set(self.terms), f"method = {self.method!r}"
        fofa = {**{f"fofa.{key}": ("fofa",) for key in FofaPlan.model_fields}, **dict.fromkeys(_PROMPTED, ("fofa",))}
        why = {"balance_every": "balance = 'fixed'"} if self.balance == "fixed" else {}
        why |= {"fofa.emphasis_power": "fofa.emphasis = 'none'"} if self.fofa.emphasis == "none" else {}
        why |= {} if self.fofa.feedback else {"fofa.fusion": "fofa.feedback = false"}
        why |= {} if self.fofa.prompted_stages else dict.fromkeys(_PROMPTED, "fofa.prompted_stages = []")
        why |= {key: method for key, terms in {**fofa, **_USED_BY}.items() if used.isdisjoint(terms)}
        default = DistillPlan()
        return {key: reason for key, reason in why.items() if attrgetter(key)(self) != attrgetter(key)(default)}

    @model_validator(mode="after")
    def _taught_something(self) -> Self:
        if not self.weights.ce and not any(getattr(self.weights, term) for term in self.terms):
            raise ValueError("all weights of the loss are 0: raise weights.ce, or that of a term of the method")
        return self

    @model_validator(mode="after")
    def _prompted(self) -> Self:
        held = self.weights.anchor or self.weights.supervision or self.fofa.prompt_share < 1
        if self.fofa.path == "side" and held:
            unused = "weights.anchor and supervision, and prompt_share"
            raise ValueError(f"with fofa.path 'side' no teacher is prompted: leave out {unused}")
        return self

    @field_validator("method")
    @classmethod
    def _known(cls, value: str) -> str:
        known = (*LOGIT_TERMS, *FEATURE_TERMS)
        unknown = [part.strip() for part in value.split("+") if part.strip() not in known]
        if value != "none" and unknown:
            raise ValueError(
                f"unknown method {', '.join(map(repr, unknown))}; known: none, {', '.join(known)}, and sums such as fofa+rsd+dist"
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
