"""A ready-made ONNX file as a captured graph: copied, checked, given a sidecar and golden outputs by the numpy evaluator.

Nothing here needs PyTorch: the model the artifacts are held to is the file itself.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx.external_data_helper import uses_external_data
from pydantic import ValidationError

from fofa_deploy.config import DataPlan, LimitsPlan
from fofa_deploy.data import Split, load_data, preprocessing, write_split
from fofa_deploy.errors import GraphError
from fofa_deploy.isolate import run_isolated
from fofa_deploy.metrics import compare
from fofa_deploy.pixels import take_pixels
from fofa_deploy.profile import find_profile
from fofa_deploy.progress import Progress
from fofa_deploy.store import Store
from fofa_deploy.tune import Evidence, Settings, Tuner
from fofa_deploy.types import Frozen, Graph, HardwareProfile, Sidecar, TensorSpec
from fofa_deploy.verify import answers_of, same_answers

GOLDEN, NOTICES = 8, "notices.json"
KEY = "fofa_deploy.sidecar"
QUANTIZED = {f"{name}Linear" for name in ("Quantize", "Dequantize", "DynamicQuantize")}
QUANTIZED |= {"ConvInteger", "MatMulInteger", "QLinearConv", "QLinearMatMul"}
_DTYPES: dict[int, str] = {onnx.TensorProto.FLOAT: "float32", onnx.TensorProto.UINT8: "uint8"}


class Preparation(Frozen):
    """How to feed a file that does not say it itself, and whether what is made of it is to take pixels."""

    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)
    pixels: bool = False


class Answers(Frozen):
    """Where to write a graph's logits float32 (N,K) for uint8 images (N,C,H,W)."""

    graph: Path
    profile: HardwareProfile
    images: Path
    out: Path


class Done(Frozen):
    images: int


def answer(request: Answers) -> Done:
    """Run the float graph on images; in a child process."""
    images = np.load(request.images, mmap_mode="r", allow_pickle=False)
    np.save(request.out, answers_of(Graph.load(request.graph), request.profile, images))
    return Done(images=len(images))


def read_sidecar(file: Path, preparation: Preparation) -> Sidecar:
    """The sidecar beside the file or inside it; else one made from its input and output.

    Raises:
        GraphError: it is no ONNX file, or does not map one image batch (B,C,H,W) to one batch of logits (B,K).
    """
    try:
        onnx.checker.check_model(str(file))
        model = onnx.load(file, load_external_data=False)
    except (onnx.checker.ValidationError, DecodeError, OSError) as error:
        raise GraphError(f"{file} is not a valid ONNX file: {str(error).splitlines()[0]}", "export it again") from error
    if outside := [tensor.name for tensor in model.graph.initializer if uses_external_data(tensor)]:
        problem = f"{file} keeps {len(outside)} of its weights in another file, {outside[0]} for one"
        raise GraphError(problem, "export it as one file: torch.onnx.export(..., external_data=False)")
    if done := sorted({node.op_type for node in model.graph.node} & QUANTIZED):
        problem = f"{file} is quantized already, it has {', '.join(done)}"
        raise GraphError(problem, "give the float model; or measure it as it is: fofa-deploy profile FILE --target PROFILE")
    beside = file.with_name("sidecar.json")
    inside = {prop.key: prop.value for prop in model.metadata_props}.get(KEY)
    if beside.is_file() or inside:
        where = beside if beside.is_file() else file
        try:
            sidecar = Sidecar.model_validate_json(beside.read_bytes() if beside.is_file() else str(inside))
            _data_plan(sidecar, None)
        except ValidationError as error:
            raise GraphError(f"the sidecar in {where} is not one of ours: {error.errors()[0]['msg']}", "export it again") from error
        if sidecar.input.shape != (None, *_sides(sidecar)):
            problem = (
                f"the sidecar in {where} tells of images {sidecar.preprocessing.image_size} and of an input {sidecar.input.shape}"
            )
            raise GraphError(problem, "export it again")
        return sidecar
    return _derived(model, file, preparation)


def _sides(sidecar: Sidecar) -> tuple[int, int, int]:
    """Of one image, in the input's layout."""
    channels, (height, width) = sidecar.preprocessing.channels, sidecar.preprocessing.image_size
    return (height, width, channels) if sidecar.layout == "NHWC" else (channels, height, width)


def _derived(model: onnx.ModelProto, file: Path, preparation: Preparation) -> Sidecar:
    weights = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in weights]
    shapes = [_shape(value) for value in (*inputs, *model.graph.output)]
    if len(inputs) != 1 or len(model.graph.output) != 1 or len(shapes[0]) != 4 or len(shapes[1]) != 2:
        raise GraphError(
            f"{file} maps {shapes}: not images (B,C,H,W) to logits (B,K)", "give a classifier with one input and output"
        )
    (batch, *sides), (_, classes) = shapes
    if batch is not None:
        raise GraphError(f"{file} takes batches of {batch} alone", "export it with a dynamic batch axis")
    layout: Literal["NCHW", "NHWC"] = "NHWC" if sides[0] not in (1, 3) and sides[2] in (1, 3) else "NCHW"
    channels, height, width = sides if layout == "NCHW" else (sides[2], *sides[:2])
    if not (channels in (1, 3) and height and width and classes):
        raise GraphError(f"{file} has dynamic sides or channels: {shapes[0]}", "fix all but the batch axis when exporting")
    dtype = _DTYPES.get(inputs[0].type.tensor_type.elem_type)
    if dtype is None:
        names = {number: name.lower() for name, number in onnx.TensorProto.DataType.items()}
        told = names.get(inputs[0].type.tensor_type.elem_type, "a type that is none")
        raise GraphError(f"{file} takes images in {told}", "export it in float32, or in uint8 for pixels")
    try:
        plan = DataPlan(
            name="images",
            classes=classes,
            image_size=(height, width),
            channels=1 if channels == 1 else 3,
            mean=preparation.mean,
            std=preparation.std,
        )
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise GraphError(
            f"{file}, images {shapes[0]}: {place} {first['msg']}", "see --mean and --std, or export it again"
        ) from error
    return Sidecar(
        model=file.name,
        input=TensorSpec(name=inputs[0].name, shape=(None, *sides), dtype=dtype),
        output=TensorSpec(name=model.graph.output[0].name, shape=(None, classes)),
        preprocessing=preprocessing(plan),
        class_names=tuple(str(number) for number in range(classes)),
        layout=layout,
    )


def _shape(value: onnx.ValueInfoProto) -> tuple[int | None, ...]:
    return tuple(d.dim_value if d.dim_value > 0 else None for d in value.type.tensor_type.shape.dim)


def adopt(store: Store, file: Path, images: Path | None, preparation: Preparation, progress: Progress, settings: Settings) -> Tuner:
    """A tuner for a ready-made ONNX file.

    Args:
        images: folder of real images; without it inputs are seeded noise, and nothing can be calibrated.
    """
    sidecar = read_sidecar(file, preparation)
    derived = sidecar.model == file.name
    if derived and images and preparation == Preparation(pixels=preparation.pixels):
        progress.say(f"{file.name} has no sidecar: mean 0.5 and std 0.5 are taken for its input; --mean and --std say otherwise")
    data = None if images is None else load_data(_data_plan(sidecar, images), settings.seed)
    limits = settings.limits

    def fill_data(out: Path) -> None:
        if data is None:
            _write_noise(sidecar, out / "validation", settings.seed)
            return
        # Every fifth image, which a plan would keep for testing: nothing else is judged here.
        write_split(data.test, out / "validation", progress, "validation")
        write_split(Split(data.train.source, data.train.indices[:256]), out / "calibration", progress, "calibration")

    splits = store.run(
        "data", {"images": data.digest if data else None, "sidecar": sidecar, "seed": settings.seed}, fill_data, version=2
    )

    def fill_graph(out: Path) -> None:
        shutil.copyfile(file, out / "model.onnx")
        (out / "sidecar.json").write_text(sidecar.model_dump_json(indent=1))
        golden = np.load(splits / "validation" / "images.npy", mmap_mode="r")[:GOLDEN]
        golden = np.resize(golden, (GOLDEN, *golden.shape[1:]))
        np.save(out / "golden-pixels.npy", golden)
        progress.say("evaluate the golden inputs with numpy")
        logits = _answers(out, "reference", out / "golden-pixels.npy", out / "golden-logits.npy", limits)
        taken = _with_pixels(out, sidecar) if preparation.pixels else sidecar
        np.savez(out / "golden.npz", images=taken.prepare(golden), logits=logits)

    made_of = {"file": file, "sidecar": sidecar, "images": splits} | ({"pixels": True} if preparation.pixels else {})
    graph = store.run("graph", made_of, fill_graph)

    def fill_expected(out: Path) -> None:
        asked = splits / "validation" / "images.npy", out / "validation.npy", limits
        told, known = _answers(graph, "cpu-onnxruntime", *asked), np.load(graph / "golden-logits.npy")
        if not same_answers(compare(told[:GOLDEN], known[: len(told)], None)):
            (out / NOTICES).write_text(json.dumps([f"onnxruntime runs {file.name} wrong: it is held to numpy's answers"]))
            progress.say("evaluate all images with numpy")
            _answers(graph, "reference", *asked)

    expected = store.run("expected", {"graph": graph, "images": splits}, fill_expected, version=2)
    if (expected / NOTICES).is_file():
        store.notices += json.loads((expected / NOTICES).read_bytes())
    if images is None:
        store.notices.append(f"no --images: nothing is calibrated, and all is judged by {GOLDEN} images of noise, a weak test")
    calibration = splits / "calibration"
    evidence = Evidence(graph / "golden.npz", splits, expected)
    return Tuner(store, graph, evidence, calibration if calibration.is_dir() else None, settings, progress)


def _with_pixels(folder: Path, sidecar: Sidecar) -> Sidecar:
    """Have the graph in a folder take pixels; its golden outputs stay those of the file."""
    model, taken = take_pixels(onnx.load(folder / "model.onnx"), sidecar)
    onnx.helper.set_model_props(model, {KEY: taken.model_dump_json()})
    onnx.save(model, folder / "model.onnx")
    (folder / "sidecar.json").write_text(taken.model_dump_json(indent=1))
    return taken


def _answers(graph: Path, profile: str, images: Path, out: Path, limits: LimitsPlan) -> np.ndarray:
    request = Answers(graph=graph, profile=find_profile(profile), images=images, out=out)
    run_isolated("fofa_deploy.adopt:answer", request, Done, seconds=limits.run_seconds, memory_bytes=limits.memory_bytes)
    logits: np.ndarray = np.load(out, allow_pickle=False)
    return logits


def _data_plan(sidecar: Sidecar, images: Path | None) -> DataPlan:
    known = sidecar.preprocessing
    return DataPlan(name="images", root=images, class_names=sidecar.class_names, **known.model_dump())


def _write_noise(sidecar: Sidecar, folder: Path, seed: int) -> None:
    folder.mkdir()
    shape = (GOLDEN, sidecar.preprocessing.channels, *sidecar.preprocessing.image_size)
    np.save(folder / "images.npy", np.random.default_rng(seed).integers(0, 256, shape, np.uint8))
    np.save(folder / "labels.npy", np.zeros(GOLDEN, np.int64))
