"""The frozen values that travel between stages. Shapes are NCHW; sizes are bytes; times are milliseconds."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt

from fofa_deploy.errors import IntegrityError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Feeds = Mapping[str, "NDArray[np.generic]"]
Scalar = bool | int | float | str
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


HOST = r"^([A-Za-z0-9_][A-Za-z0-9_.-]*@)?[A-Za-z0-9][A-Za-z0-9_.:-]*$"
"""What ssh takes for a destination and no shell and no option parser takes for anything else."""


class Frozen(BaseModel):
    """An immutable value with a closed set of fields and no NaN or infinity in it."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def digest_file(path: Path) -> str:
    """SHA-256 of a file's content, hexadecimal, read in bounded memory."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


class Precision(StrEnum):
    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"
    INT8 = "int8"


class Status(StrEnum):
    """How one recipe of one target ended."""

    VERIFIED = "verified"
    BUILT_NOT_RUN = "built-not-run"
    REJECTED = "rejected"
    FAILED = "failed"
    SKIPPED = "skipped"


# --- hardware -------------------------------------------------------------------------------------------------


class Device(Frozen):
    """What the deployed model runs on, and how to reach it."""

    kind: Literal["cpu", "gpu", "npu"] = "cpu"
    name: str = Field(default="CPU", description="the runtime's own name of the device, such as CPU, GPU.0, NPU")
    architecture: Literal["any", "x86_64", "aarch64"] = "any"
    features: tuple[str, ...] = Field(default=(), description="CPU flags that must be there, as /proc/cpuinfo spells them")
    host: str | None = Field(
        default=None, pattern=HOST, description="user@host of the device, or adb:SERIAL; this machine when absent"
    )
    python: str = Field(
        default="python3",
        pattern=r"^[A-Za-z0-9_./][A-Za-z0-9_./+-]*$",
        description="the interpreter there that has the runtime; a relative path begins at the home folder",
    )


class Execution(Frozen):
    """How a session is run."""

    threads: NonNegativeInt = Field(default=0, description="intra-op threads; 0 = every core this process may use")
    batch_sizes: tuple[PositiveInt, ...] = Field(default=(1,), min_length=1, description="recipes are chosen by the first one")
    spinning: bool = Field(default=True, description="threads may busy-wait: right on an idle device, wrong on a shared one")

    @property
    def thread_count(self) -> int:
        return self.threads or len(os.sched_getaffinity(0))


class Budget(Frozen):
    """Limits an artifact must keep, all upper ones but the last; absent = unlimited."""

    p90_ms: PositiveFloat | None = None
    size_bytes: PositiveInt | None = None
    peak_rss_bytes: PositiveInt | None = None
    throughput_sps: PositiveFloat | None = Field(default=None, description="least images per second")


class HardwareProfile(Frozen):
    """One deployment target: a runtime on a device."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")
    description: str
    runtime: str = Field(description="name of a registered back end")
    precisions: tuple[Precision, ...] = Field(min_length=1)
    device: Device = Device()
    execution: Execution = Execution()
    budget: Budget = Budget()


class Probe(Frozen):
    """What a back end can do for a profile on this machine, and why not."""

    can_build: bool
    can_run: bool
    reason: str = ""
    versions: dict[str, str] = {}


# --- graphs and artifacts -------------------------------------------------------------------------------------


InputForm = Literal["float32-nchw", "uint8-nhwc"]
"""How a graph takes images: normalized by its caller, or as they are, to normalize them itself."""


class TensorSpec(Frozen):
    name: str
    shape: tuple[PositiveInt | None, ...] = Field(description="None marks a dynamic axis: the batch, in all that is built here")
    dtype: str = "float32"


class Preprocessing(Frozen):
    """From a decoded image to the network's input; all a caller needs to know."""

    image_size: tuple[PositiveInt, PositiveInt] = Field(description="height, width")
    channels: Literal[1, 3]
    mean: tuple[float, ...]
    std: tuple[PositiveFloat, ...]
    interpolation: Literal["bilinear", "bicubic", "nearest"] = "bilinear"
    crop_fraction: Fraction = 1.0

    def apply(self, images: NDArray[np.generic]) -> NDArray[np.float32]:
        """uint8 (B,C,H,W) in 0..255 -> float32 (B,C,H,W), (x/255 - mean)/std per channel."""
        import numpy as np

        scale = 1.0 / (255.0 * np.asarray(self.std, np.float64))
        shift = np.asarray(self.mean, np.float64) / np.asarray(self.std, np.float64)
        shape = (1, self.channels, 1, 1)
        out = images.astype(np.float32) * scale.astype(np.float32).reshape(shape)
        return np.asarray(out - shift.astype(np.float32).reshape(shape), np.float32)


class Sidecar(Frozen):
    """What the graph file alone does not say; lies beside every graph and artifact as ``sidecar.json``."""

    schema_version: Literal[1] = 1
    model: str
    input: TensorSpec = Field(description="of uint8 where the graph itself normalizes")
    output: TensorSpec
    preprocessing: Preprocessing
    class_names: tuple[str, ...]
    layout: Literal["NCHW", "NHWC"] = Field(
        default="NCHW",
        exclude_if=lambda layout: layout == "NCHW",  # sidecars without it are what they were, and so are stages' keys
        description="of the input",
    )

    def prepare(self, images: NDArray[np.generic]) -> NDArray[np.generic]:
        """The graph's input for uint8 (B,C,H,W), in its own type and layout."""
        import numpy as np

        ready = images if self.input.dtype == "uint8" else self.preprocessing.apply(images)
        return np.ascontiguousarray(ready.transpose(0, 2, 3, 1) if self.layout == "NHWC" else ready)


class Graph(Frozen):
    """A captured float ONNX graph: logits (B,classes) from images as its sidecar prepares them, dynamic batch."""

    path: Path
    sha256: str
    sidecar: Sidecar

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read ``model.onnx`` and ``sidecar.json`` of a folder."""
        sidecar = Sidecar.model_validate_json((folder / "sidecar.json").read_bytes())
        path = folder / "model.onnx"
        return cls(path=path, sha256=digest_file(path), sidecar=sidecar)


class Calibration(Frozen):
    """Real images for post-training quantization, streamed from a memory-mapped file."""

    images: Path = Field(description=".npy file, uint8 (N,C,H,W)")
    sidecar: Sidecar = Field(description="of the graph that is to be quantized")
    statistics: Path | None = Field(default=None, description="folder of what the graph does on them, when that is known already")
    sensitivity: Path | None = Field(default=None, description="folder of what quantizing each layer does, likewise")

    def batches(self, size: int) -> Iterator[Feeds]:
        """Feeds of at most ``size`` images each, in file order."""
        import numpy as np

        images = np.load(self.images, mmap_mode="r", allow_pickle=False)
        for start in range(0, len(images), size):
            yield {self.sidecar.input.name: self.sidecar.prepare(images[start : start + size])}


class Recipe(Frozen):
    """One way to turn a graph into an artifact: a name that explains itself and the options behind it."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._+-]*$")
    precision: Precision = Field(description="what the layers with weights must really run in")
    description: str
    needs_calibration: bool = False
    observes: Literal["nothing", "statistics", "sensitivity"] = Field(
        default="nothing",
        description="what it wants to know that is found out once for all recipes; the last includes the one before",
    )
    family: str = Field(
        default="",
        description="recipes of one family run the same kernels, and so have one latency: they differ in the numbers alone; "
        "a family of its own when empty",
    )
    after: str = Field(default="", description="a faster family; worth a try only where all of that missed the accuracy budget")
    rest: Precision | None = Field(
        default=None,
        exclude_if=lambda rest: rest is None,
        description="what layers in no less than float run in, where there is a choice; the recipes of the faster float are tried",
    )
    dear: bool = Field(
        default=False,
        exclude_if=lambda dear: not dear,
        description="takes far longer to build than others of its precision: candidates are timed by those first",
    )
    on_request: bool = Field(
        default=False,
        exclude_if=lambda on_request: not on_request,
        description="tried only when it is asked for by name: wherever it was measured, others were faster or closer",
    )
    options: dict[str, Scalar] = {}

    @property
    def kin(self) -> str:
        """The name of its family."""
        return self.family or self.name


class Layer(Frozen):
    """One row of the layer table: what the runtime itself reports, not what was asked for."""

    name: str
    operator: str
    precision: str
    weighted: bool = Field(description="convolution or matrix product with constant weights, the layers that cost")


class LayerTime(Frozen):
    """What one layer takes, as the runtime's own profiler tells it; its names are those of the layer table where they can be."""

    name: str
    operator: str
    precision: str
    ms: float = Field(ge=0.0, description="mean over the profiled runs")


class FileRecord(Frozen):
    path: str = Field(description="relative to the folder that holds the record, POSIX separators")
    sha256: str
    size_bytes: NonNegativeInt

    @classmethod
    def of(cls, folder: Path, path: Path) -> Self:
        return cls(path=path.relative_to(folder).as_posix(), sha256=digest_file(path), size_bytes=path.stat().st_size)


def digest_records(records: Sequence[FileRecord]) -> str:
    """Over all files; the file's own digest when there is only one."""
    if len(records) == 1:
        return records[0].sha256
    return hashlib.sha256("".join(record.sha256 for record in records).encode()).hexdigest()


def check_records(folder: Path, records: Sequence[FileRecord], since: str, action: str) -> None:
    """Raises: IntegrityError: a file is not the recorded one."""
    for record in records:
        path = folder / record.path
        if not path.is_file() or digest_file(path) != record.sha256:
            raise IntegrityError(f"{path} is missing or altered since it was {since}", action)


class Artifact(Frozen):
    """What a back end built. ``files[0]`` is the one to load; all lie in ``folder`` beside ``artifact.json``."""

    backend: str
    recipe: Recipe
    graph_sha256: str
    files: tuple[FileRecord, ...] = Field(min_length=1)
    layers: tuple[Layer, ...]
    versions: dict[str, str]
    sidecar: Sidecar
    folder: Path = Field(exclude=True)

    @property
    def path(self) -> Path:
        return self.folder / self.files[0].path

    @property
    def sha256(self) -> str:
        """Digest over all files; the file's own digest when there is only one."""
        return digest_records(self.files)

    @property
    def size_bytes(self) -> int:
        return sum(f.size_bytes for f in self.files)

    @classmethod
    def of(
        cls,
        out: Path,
        main: Path,
        *,
        backend: str,
        recipe: Recipe,
        graph: Graph,
        layers: tuple[Layer, ...],
        versions: dict[str, str],
    ) -> Self:
        """Record every file of ``out``, ``main`` first, and write ``artifact.json`` and ``sidecar.json`` beside them."""
        others = sorted(p for p in out.rglob("*") if p.is_file() and p != main and p.suffix != ".json")
        artifact = cls(
            backend=backend,
            recipe=recipe,
            graph_sha256=graph.sha256,
            files=tuple(FileRecord.of(out, p) for p in (main, *others)),
            layers=layers,
            versions=versions,
            sidecar=graph.sidecar,
            folder=out,
        )
        (out / "artifact.json").write_text(artifact.model_dump_json(indent=1))
        (out / "sidecar.json").write_text(graph.sidecar.model_dump_json(indent=1))
        return artifact

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read ``artifact.json`` and digest every file again.

        Raises:
            IntegrityError: the record is missing, malformed or names files elsewhere, or a file is not the recorded one; nothing
                of it reaches a runtime.
        """
        import json

        record, action = folder / "artifact.json", "build the artifact again"
        try:
            artifact = cls.model_validate({**json.loads(record.read_bytes()), "folder": folder})
        except (OSError, ValueError, TypeError, RecursionError) as error:  # pydantic's ValidationError is a ValueError
            raise IntegrityError(f"{record} is no record of an artifact: {str(error).splitlines()[0]}", action) from error
        # By name: a link may lead to wherever a store of large files keeps them, and their content is digested.
        if outside := [file.path for file in artifact.files if Path(file.path).is_absolute() or ".." in Path(file.path).parts]:
            raise IntegrityError(f"{record} names {outside[0]!r}, which leaves its folder", action)
        check_records(folder, artifact.files, "built", action)
        return artifact


class ModelFile(Frozen):
    """A model that others built, as the runtime that is to run it describes it."""

    path: Path
    files: tuple[FileRecord, ...] = Field(min_length=1, description="the model itself, then what lies beside it for its use")
    inputs: tuple[TensorSpec, ...]
    layers: tuple[Layer, ...]

    @property
    def sha256(self) -> str:
        """As of an `Artifact`."""
        return digest_records(self.files)

    @property
    def size_bytes(self) -> int:
        return sum(f.size_bytes for f in self.files)

    def check(self) -> None:
        """Digest every file again.

        Raises:
            IntegrityError: it is not what was looked at; nothing of it reaches a runtime.
        """
        check_records(self.path.parent, self.files, "checked", "leave it alone while it is measured")
