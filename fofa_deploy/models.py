"""Names and checkpoints -> modules. Weights are loaded strictly, and never by running what a file contains."""

from __future__ import annotations

import importlib
import pickle
import re
import struct
import sys
import warnings
from collections.abc import Collection, Iterator
from contextlib import redirect_stdout
from difflib import get_close_matches
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fofa_deploy.config import ModelPlan
from fofa_deploy.errors import ModelError
from fofa_deploy.prune import FAULTS, PRUNING_VERSION, evaluating, prune
from fofa_deploy.timm_entry import create

MOST_TENSORS = 20_000

CONTAINERS = ("state_dict", "model_state_dict", "model", "net")
"""Keys under which training scripts keep the weights, one perhaps within another."""

POINTER = b"version https://git-lfs"


def build_model(plan: ModelPlan, classes: int, channels: int, image_size: tuple[int, int]) -> nn.Module:
    """The plan's network for ``classes`` logits and images (B,channels,H,W), with its checkpoint if it names one.

    It is pruned last, by the weights that it came with.

    Raises:
        ModelError: no such model, arguments or images it does not take, other numbers of logits, weights that do not fit, or it
            cannot be pruned.
    """
    kind, _, name = plan.model.partition(":")
    try:
        if kind == "timm":
            model = _timm_model(name, plan, classes, channels, image_size)
        else:
            function = _resolve(plan.model)
            with redirect_stdout(sys.stderr):  # as while its module is imported
                model = function(num_classes=classes, in_chans=channels, **plan.arguments)
    except FAULTS as error:
        action = "check the model's arguments and image_size"
        raise ModelError(f"{plan.model} cannot be made for images of {image_size[0]} x {image_size[1]}: {error}", action) from error
    _try_out(model, plan.model, torch.zeros(2, channels, *image_size), classes)
    if plan.checkpoint:
        load_weights(model, plan.checkpoint)
    if plan.prune:
        prune(model, plan.prune, (channels, *image_size), plan.model)
    return model


def refuse_random_head(plan: ModelPlan, classes: int) -> None:
    """Of a network that nothing trains: timm gives its weights a new, random classifier where they know other classes.

    Raises:
        ModelError: it does here.
    """
    kind, _, name = plan.model.partition(":")
    config = _timm_config(name, True) if kind == "timm" and plan.pretrained and not plan.checkpoint else None
    if config is not None and config.num_classes != classes:
        problem = f"timm's weights of {plan.model} know {config.num_classes} classes, and the data have {classes}"
        raise ModelError(problem, "add a [distill] table to train it by, or name a checkpoint")


def _try_out(model: nn.Module, name: str, images: Tensor, classes: int) -> None:
    """Some networks take images of a few sizes alone, or classify as they like, and do not say so before they see one."""
    try:
        with evaluating(model), torch.no_grad():
            logits = model(images)
    except FAULTS as error:
        height, width = images.shape[2:]
        raise ModelError(
            f"{name} does not take images of {height} x {width}: {_first_line(error)}", "give it another image_size"
        ) from error
    found = tuple(logits.shape) if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
    if found != (len(images), classes):
        problem = f"{name} makes {found} of {len(images)} images, and there are {classes} classes"
        action = f"make it pass logits of shape (B, {classes}): it is called with num_classes = {classes}"
        raise ModelError(problem, action)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _timm_model(name: str, plan: ModelPlan, classes: int, channels: int, image_size: tuple[int, int]) -> nn.Module:
    config = _timm_config(name, plan.pretrained)
    fixed: dict[str, Any] = {"img_size": image_size} if config is not None and config.fixed_input_size else {}
    options = {"pretrained": plan.pretrained, "num_classes": classes, "in_chans": channels}
    try:
        return create(name, {**fixed, **plan.arguments}, **options)
    except OSError as error:
        problem = f"the weights of {plan.model} cannot be fetched: {_first_line(error)}"
        raise ModelError(problem, "connect, or name a checkpoint") from error


def _timm_config(name: str, pretrained: bool) -> Any:  # noqa: ANN401 - timm's PretrainedCfg, or None
    """What timm knows of a network's weights, by its name and their tag (``resnet18.a1_in1k``)."""
    import timm

    if not timm.is_model(name):
        near = get_close_matches(name, timm.list_models(), n=3)
        raise ModelError(f"timm has no model {name!r}", f"did you mean {', '.join(near)}?" if near else "see timm.list_models()")
    architecture = name.partition(".")[0]
    try:
        config = timm.get_pretrained_cfg(name)
    except RuntimeError as error:
        tags = ", ".join(timm.list_pretrained(f"{architecture}.*"))
        raise ModelError(f"timm has no weights {name!r}", f"take one of {tags}" if tags else "leave out the tag") from error
    if pretrained and config is not None and not config.has_weights:  # none for names of old, which timm still knows
        action = "set pretrained = false, or name a checkpoint or another model"
        raise ModelError(f"timm has no pretrained weights for {name!r}", action)
    return config


def _resolve(reference: str) -> Any:  # noqa: ANN401 - the user's callable
    module, _, attribute = reference.partition(":")
    if str(Path.cwd()) not in sys.path:  # as python -m does, and the console script does not
        sys.path.append(str(Path.cwd()))
    try:
        with redirect_stdout(sys.stderr):  # what a command prints there is for other programs to read
            function = getattr(importlib.import_module(module), attribute)
    except (Exception, SystemExit) as error:  # whatever importing a user's module comes to
        action = "write timm:NAME, or package.module:function of something importable"
        raise ModelError(f"model {reference!r} does not resolve: {type(error).__name__}: {error}", action) from error
    if not callable(function):
        raise ModelError(f"model {reference!r} is not callable", "name a function or class that returns a torch.nn.Module")
    return function


def code_identity(plan: ModelPlan) -> object:
    """What defines the model beside its plan: timm's version, or the files of the user's own; and what prunes it."""
    kind, _, _ = plan.model.partition(":")
    found: object = version("timm") if kind == "timm" else _sources(plan.model)
    return [found, version("torch-pruning"), PRUNING_VERSION] if plan.prune else found


def _sources(reference: str) -> list[Path | str]:
    """The module that is named, the one that defines what it names, and all of the packages that they are in."""
    function = _resolve(reference)
    names = {reference.partition(":")[0], str(getattr(function, "__module__", ""))} & sys.modules.keys()
    packages = {name.partition(".")[0] for name in names}
    found = [Path(str(file)) for name in names | packages if (file := getattr(sys.modules[name], "__file__", None))]
    inside = [path for file in found if file.name == "__init__.py" for path in file.parent.rglob("*.py")]
    return [*sorted({*found, *inside})] or [*sorted(names)]


def find_model(plan: ModelPlan) -> None:
    """Raise ModelError, naming the nearest, unless the plan's model name resolves, to one with weights where it asks for them."""
    kind, _, name = plan.model.partition(":")
    if kind == "timm":
        _timm_config(name, plan.pretrained)
    else:
        _resolve(plan.model)


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, or of a .pt/.pth file that holds nothing but tensors.

    Raises:
        ModelError: missing, damaged, or it would have to run code.
    """
    if not path.is_file():
        raise ModelError(f"checkpoint {path} does not exist", "check the path")
    if path.stat().st_size == 0:
        raise ModelError(f"checkpoint {path} is empty", "save or download it again")
    try:
        with path.open("rb") as file:
            if file.read(len(POINTER)) == POINTER:
                raise ModelError(f"checkpoint {path} is the pointer that Git LFS keeps in place of a file", "run git lfs pull")
        return _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    except (*FAULTS, OSError) as error:
        problem = f"checkpoint {path} cannot be read as plain tensors: {_first_line(error)}"
        raise ModelError(problem, "save the state_dict alone, as .safetensors") from error


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            keys = list(file.keys())
            if len(keys) > MOST_TENSORS:
                raise ModelError(f"{path} holds {len(keys)} tensors", f"no model here has more than {MOST_TENSORS}")
            return {key: file.get_tensor(key) for key in keys}
    except SafetensorError as error:
        raise ValueError(str(error)) from error


def _read_torch(path: Path) -> dict[str, Tensor]:
    try:
        with warnings.catch_warnings(action="ignore"):  # of what it goes on to refuse
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (*FAULTS, pickle.UnpicklingError, struct.error, EOFError) as error:  # damaged pickles raise what they like
        named = re.search(r"Unsupported global: GLOBAL (\S+)", str(error))  # of words that also advise to run it
        script = (
            "it is a TorchScript archive, which is code" if "TorchScript" in str(error) else "it is no whole file of torch.save"
        )
        raise ValueError(f"it holds {named[1]}, and to load that would run code" if named else script) from error
    for _ in CONTAINERS:
        inner = [state[key] for key in CONTAINERS if isinstance(state, dict) and isinstance(state.get(key), dict)]
        state = inner[0] if inner else state
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise ValueError("it is not a dictionary of tensors")
    return dict(state)


def _unwrapped(state: dict[str, Tensor], expected: Collection[str]) -> dict[str, Tensor]:
    """By the names that suit the network best: as they are, or without those of what it was wrapped in."""
    return max(_unwrappings(state), key=lambda names: len(names.keys() & expected))


def _unwrappings(state: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """DataParallel and Lightning put a name in front of every other, and torch.compile one in front of those of its module."""
    while True:
        yield state
        bare = {key.replace("_orig_mod.", ""): value for key, value in state.items()}
        if len(bare) == len(state):
            yield bare
        if len({key.partition(".")[0] for key in state}) != 1 or not all("." in key for key in state):
            return
        state = {key.partition(".")[2]: value for key, value in state.items()}


def load_weights(model: nn.Module, path: Path) -> None:
    """Strictly load a checkpoint: every tensor there, none left over, all finite but what the network itself makes infinite.

    Raises:
        ModelError: naming what does not fit.
    """
    expected = model.state_dict()
    state = _unwrapped(read_weights(path), expected.keys())
    missing, extra = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    reshaped = [
        f"{key}: {_shape(state[key])} in the file, {_shape(expected[key])} in the model"
        for key in sorted(expected.keys() & state.keys())
        if expected[key].shape != state[key].shape
    ]
    if missing or extra or reshaped:
        problems = [
            f"{len(n)} {what} ({n[0]}{', ...' if len(n) > 1 else ''})"
            for what, n in (("missing", missing), ("unknown", extra), ("of another shape", reshaped))
            if n
        ]
        raise ModelError(
            f"checkpoint {path} does not fit the model: tensors {', '.join(problems)}",
            "check model, arguments, classes and image_size",
        )
    if odd := [key for key, value in state.items() if not _is_plain(value, expected[key])]:
        problem = f"checkpoint {path} holds {odd[0]} as {str(state[odd[0]].dtype).removeprefix('torch.')}, {state[odd[0]].layout}"
        raise ModelError(problem, "save the weights as plain tensors of floats")
    if broken := [key for key, value in state.items() if not is_sound(value, like=expected[key])]:
        raise ModelError(f"checkpoint {path} has NaN or infinity in {broken[0]}", "use an earlier checkpoint")
    model.load_state_dict(state, strict=True)


def is_sound(value: Tensor, like: Tensor | None = None) -> bool:
    """Whether it has no NaN, and infinity only where the tensor that a network was made with has it: a mask of -inf."""
    if not value.is_floating_point() or value.float().isfinite().all():
        return True
    return like is not None and torch.equal(value.isfinite(), like.isfinite().to(value.device)) and not bool(value.isnan().any())


def _shape(tensor: Tensor) -> str:
    return " x ".join(map(str, tensor.shape)) or "a number"


def _is_plain(value: Tensor, expected: Tensor) -> bool:
    """Numbers in memory that copying does not turn into others of another kind."""
    alike = value.is_floating_point() == expected.is_floating_point() and value.is_complex() == expected.is_complex()
    return alike and value.layout == torch.strided and value.device.type == "cpu"


def save_weights(model: nn.Module, path: Path) -> None:
    """Write the state dict as safetensors, whole or not at all."""
    from safetensors.torch import save

    from fofa_deploy.store import write_atomic

    state = {key: value.detach().contiguous().cpu().clone() for key, value in model.state_dict().items()}
    write_atomic(path, save(state))


def parameter_count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
