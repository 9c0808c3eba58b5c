"""What stages find out, and the report made of it. Accuracies are fractions; sizes are bytes; times are milliseconds."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from fofa_deploy.types import Fraction, Frozen, Sidecar, Status


class Comparison(Frozen):
    """An artifact against PyTorch on the same images. ``None`` where there are no labels or nothing finite to compare."""

    samples: PositiveInt
    finite: bool
    top1: Fraction | None = None
    top5: Fraction | None = None
    agreement: Fraction = Field(description="share of images with the same top-1 class as PyTorch")
    cosine: float | None = Field(default=None, description="mean cosine similarity of the logits")
    max_abs_error: float | None = Field(default=None, description="largest absolute difference of a logit")
    relative_error: float | None = Field(default=None, description="L2 norm of the difference over that of PyTorch's logits")

    @property
    def told_error(self) -> str:
        """The relative error in words."""
        return f"relative error {'unknown' if self.relative_error is None else format(self.relative_error, '.2g')}"


class Latency(Frozen):
    """Milliseconds per run. A percentile that the sample cannot support is ``None``, not a guess."""

    min: float
    mean: float
    p50: float
    p90: float | None = None
    p95: float | None = None
    p99: float | None = None


class Environment(Frozen):
    """Where and under what conditions a measurement was taken."""

    machine: str
    cpu: str
    cores: int
    features: tuple[str, ...] = Field(description="the CPU flags that decide a kernel")
    governor: str | None
    load_average: float | None
    memory_bytes: int
    os: str
    python: str
    versions: dict[str, str]
    fingerprint: str = Field(description="digest of what makes two measurements comparable")
    affinity: tuple[int, ...] = Field(default=(), description="the cores this process may use")
    clock_mhz: float | None = Field(default=None, description="of the first core, when it was asked")
    temperature_c: float | None = Field(default=None, description="of the hottest thermal zone")
    power_mode: str | None = Field(default=None, description="nvpmodel on Jetson, the firmware's platform profile elsewhere")


class Measurement(Frozen):
    """One artifact measured on one device at one time. Never cached."""

    latency_ms: Latency
    batch: PositiveInt
    throughput_sps: PositiveFloat
    variation: float = Field(description="coefficient of variation of the runs")
    runs: PositiveInt
    warmup_runs: NonNegativeInt
    cold_start_ms: float = Field(description="load and first run, in a fresh process")
    load_ms: float | None = Field(default=None, description="the part of it in which the runtime opens its session")
    first_run_ms: float | None = None
    peak_rss_bytes: PositiveInt = Field(description="of the whole process that holds the session")
    energy_mj: float | None = None
    energy_reason: str = ""
    threads: PositiveInt
    device: str = Field(description="as the runtime itself reports it")
    artifact_sha256: str
    measured_at: str
    warnings: tuple[str, ...] = ()


class LayerCost(Frozen):
    """One layer as its runtime timed it, beside what the graph says it has to do; None where the two cannot be joined."""

    name: str
    operator: str
    precision: str
    ms: float = Field(description="by the runtime's own profiler, which slows it down: to be read as a share")
    share: Fraction = Field(description="of all layers' time")
    macs: int | None = None
    bytes: int | None = None
    of_limit: float | None = Field(default=None, description="least possible time over this one, by the roofline")


class Peaks(Frozen):
    """A machine's limits, measured."""

    gops: dict[str, PositiveFloat] = Field(description="10^9 operations per second by precision; a multiply-accumulate is two")
    gbps: PositiveFloat = Field(description="GB/s of copying, reads and writes both counted")
    threads: PositiveInt
    busy: bool = Field(default=False, description="others were at work: too low, and measured again the next time")
    measured_at: str
    fingerprint: str


class TargetRow(Frozen):
    """One recipe tried on one target."""

    target: str
    runtime: str
    profile: str
    recipe: str
    description: str = ""
    status: Status
    reason: str
    chosen: bool = False
    precision: dict[str, int] = Field(default={}, description="weighted layers per precision, as the runtime reports them")
    layer_types: dict[str, int] = Field(default={}, description="'operator precision' -> count over the whole layer table")
    validation: Comparison | None = Field(default=None, description="on the validation split: what the choice was made by")
    golden: Comparison | None = Field(default=None, description="on the golden inputs captured with the graph")
    top1: Fraction | None = Field(default=None, description="on the test split, read once, for the chosen recipe only")
    top5: Fraction | None = None
    agreement: Fraction | None = None
    size_bytes: int | None = None
    latency_ms: Latency | None = None
    throughput_sps: float | None = None
    peak_rss_bytes: int | None = None
    cold_start_ms: float | None = None
    measurement: Measurement | None = None
    other_batches: tuple[Measurement, ...] = Field(
        default=(), description="the chosen artifact at other batch sizes and numbers of threads"
    )
    layers: tuple[LayerCost, ...] = Field(default=(), description="of the chosen artifact, the slowest first")
    peaks: Peaks | None = None
    of_limit: float | None = Field(default=None, description="least possible time of all known products over the median latency")
    speedup: float | None = Field(default=None, description="p50 of the reference over this one's, interleaved in one run")
    environment: Environment | None = None
    artifact: str | None = Field(default=None, description="folder, relative to the run directory")
    sha256: str | None = None


class ModelSummary(Frozen):
    """A model as the report names it. Accuracy is on the test split, from PyTorch."""

    model: str
    params: PositiveInt
    image_size: tuple[PositiveInt, PositiveInt] | None = Field(default=None, description="height, width that it works at")
    top1: Fraction | None = None
    top5: Fraction | None = None
    top1_validation: Fraction | None = None
    top1_alone: Fraction | None = Field(default=None, description="the same student trained without a teacher, where that was run")


class Epoch(Frozen):
    """One line of a training curve. ``losses`` holds each term before its weight."""

    epoch: PositiveInt
    step: PositiveInt
    lr: float
    loss: float
    losses: dict[str, float] = Field(default={}, description="each term before its weight")
    top1: Fraction | None = Field(default=None, description="on the validation split")
    diagnostics: dict[str, float] = Field(default={}, description="such as the prompted teacher's own accuracy")
    seconds: float


class DataSummary(Frozen):
    name: str
    classes: PositiveInt
    train: NonNegativeInt
    validation: NonNegativeInt
    test: NonNegativeInt
    digest: str


class StageTiming(Frozen):
    stage: str
    seconds: float
    reused: bool
    why: str


class CandidateRow(Frozen):
    """A network that might have become the student; its latency is an aid for choosing, taken with random weights."""

    name: str
    image_size: tuple[PositiveInt, PositiveInt] | None = Field(default=None, description="height, width")
    params: PositiveInt | None
    recipe: str
    p50_ms: PositiveFloat | None
    p90_ms: PositiveFloat | None
    size_bytes: PositiveInt | None
    rungs: tuple[Fraction, ...] = Field(description="validation accuracy after each short training")
    foretold: Fraction | None = Field(description="validation accuracy of the whole training")
    fate: str
    chosen: bool
    front: bool = Field(description="no other one beats it in foretold accuracy and latency")


class StudentChoice(Frozen):
    """How the student was chosen."""

    target: str = Field(description="whose latencies these are")
    made_at: str
    rows: tuple[CandidateRow, ...]


class RunReport(Frozen):
    """The whole record of a run; ``report.json`` is this, and every other report is rendered from it."""

    schema_version: Literal[1] = 1
    name: str
    created_at: str
    tool_version: str
    method: str = Field(description="distillation method, 'none' when the student was not distilled here")
    data: DataSummary
    teacher: ModelSummary | None
    student: ModelSummary
    targets: tuple[TargetRow, ...]
    reference: TargetRow | None = Field(default=None, description="the model to beat: fp32 on ONNX Runtime")
    sensitivity: dict[str, float] = Field(
        default={},
        description="relative squared error of the logits by layer quantized alone; the worst first",
    )
    choice: StudentChoice | None = Field(default=None, description="where the plan left the student open")
    curves: dict[str, tuple[Epoch, ...]] = Field(default={}, description="training curves by stage")
    environment: Environment
    sidecar: Sidecar | None = Field(default=None, description="input, preprocessing and classes of the deployed model")
    command: str = Field(default="", description="the command line that makes this run again")
    stages: tuple[StageTiming, ...] = ()
    notices: tuple[str, ...] = ()
