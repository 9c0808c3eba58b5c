"""Find where a model's features are: run one seeded probe batch and compare values. No model family is named here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from fofa_deploy.distill import layouts
from fofa_deploy.distill.tapped import Stage
from fofa_deploy.errors import ModelError

_BATCH = 2


@dataclass(frozen=True, slots=True)
class Tap:
    """A proven stage, how far down it is and when it runs."""

    stage: Stage
    reduction: float
    position: tuple[int, layouts.Path]


@dataclass(frozen=True, slots=True)
class Declared:
    """What the model says about a tap; ``grid`` is None where it only gives a name."""

    module: str
    reduction: float | None = None
    grid: Tensor | None = None


Visit = Callable[[str, tuple[Any, ...], Any], None]


@contextmanager
def frozen_in_eval(model: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients inside; every module's own mode afterwards."""
    modes = {module: module.training for module in model.modules()}
    try:
        with torch.no_grad():
            model.eval()
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def probe_images(model: nn.Module, image_shape: tuple[int, int, int]) -> Tensor:
    """A seeded random batch (2, C, H, W) where the model is."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(_BATCH, *image_shape, generator=generator)
    first = next(model.parameters(), images)
    return images.to(first.device, first.dtype)


def watch(model: nn.Module, images: Tensor, visit: Visit, names: Sequence[str] = ()) -> Tensor:
    """Run the model and call ``visit(name, inputs, output)`` as each module ends; all modules, or the named ones."""
    watched = {name: module for name, module in model.named_modules() if name and (not names or name in names)}
    with ExitStack() as hooks:
        for name, module in watched.items():
            hooks.enter_context(module.register_forward_hook(lambda _, args, out, name=name: visit(name, args, out)))
        return model(images)  # type: ignore[no-any-return]


# --- what the model declares ----------------------------------------------------------------------------------


def _feature_info(model: nn.Module) -> list[Mapping[str, Any]]:
    declared = getattr(model, "feature_info", None) or []
    return list(getattr(declared, "info", declared))


def _intermediates(model: nn.Module, images: Tensor) -> list[Tensor]:
    run = getattr(model, "forward_intermediates", None)
    if run is None:
        return []
    return list(run(images, output_fmt="NCHW", norm=False, intermediates_only=True))


def declarations(model: nn.Module, images: Tensor, names: Sequence[str]) -> list[Declared]:
    """Every declared tap, or the named ones; a name that the model declares comes with its map.

    Raises:
        ModelError: nothing is declared and nothing is named.
    """
    info = _feature_info(model)
    grids: Sequence[Tensor | None] = _intermediates(model, images)
    if len(grids) != len(info):
        grids = [None] * len(info)
    declared = [Declared(str(item["module"]), float(item["reduction"]), grid) for item, grid in zip(info, grids, strict=True)]
    if not names:
        if not declared:
            raise ModelError(f"{type(model).__name__} declares no features", "name the modules to tap: taps = ['layer1', ...]")
        return declared
    _require_modules(model, names)
    known = {item.module: item for item in declared}
    return [known.get(name, Declared(name)) for name in names]


def _require_modules(model: nn.Module, names: Sequence[str]) -> None:
    modules = dict(model.named_modules())
    if missing := [name for name in names if name not in modules]:
        raise ModelError(f"{type(model).__name__} has no module {', '.join(missing)}", "list names with model.named_modules()")


# --- proof ----------------------------------------------------------------------------------------------------


class _Search:
    """Watches module calls and keeps, per declared tap, the best proof of where its map is passed on."""

    def __init__(self, wanted: Sequence[Declared], own_name_only: bool) -> None:
        self.wanted, self.own_name_only = wanted, own_name_only
        self.best: dict[int, tuple[float, bool, Stage, tuple[int, layouts.Path]]] = {}
        self.calls: dict[str, int] = {}
        self.clock = 0

    def __call__(self, name: str, _: tuple[Any, ...], output: Any) -> None:  # noqa: ANN401
        self.clock += 1
        self.calls[name] = self.calls.get(name, 0) + 1
        for index, declared in enumerate(self.wanted):
            if declared.grid is not None and (not self.own_name_only or name == declared.module):
                self._compare(index, name, output, declared.module, declared.grid)

    def _compare(self, index: int, name: str, output: Any, module: str, grid: Tensor) -> None:  # noqa: ANN401
        proof = layouts.prove(output, grid, reorder=name == module)
        if proof is None:
            return
        elsewhere = not f"{name}.".startswith(f"{module}.")
        channels, height, width = grid.shape[1:]
        stage = Stage(name, channels, height, width, proof[1])
        found = (proof[0], elsewhere, stage, (self.clock, proof[1].path))
        if index not in self.best or found[:2] < self.best[index][:2]:
            self.best[index] = found

    def taps(self) -> dict[int, Tap]:
        """By index; a module that runs more than once cannot be told apart, so it proves nothing."""
        return {
            index: Tap(stage, self.wanted[index].reduction or 0.0, position)
            for index, (_, _, stage, position) in self.best.items()
            if self.calls[stage.module] == 1
        }


def _proven(model: nn.Module, images: Tensor, declared: Sequence[Declared]) -> dict[int, Tap]:
    """Declared maps found where they are declared, else (a container that never runs, say) wherever they are passed on."""
    search = _Search(declared, own_name_only=True)
    watch(model, images, search)
    found = search.taps()
    lost = [index for index, item in enumerate(declared) if item.grid is not None and index not in found]
    if lost:
        wider = _Search([declared[index] for index in lost], own_name_only=False)
        watch(model, images, wider)
        found |= {lost[place]: tap for place, tap in wider.taps().items()}
    return found


def _inferred(model: nn.Module, images: Tensor, names: Sequence[str]) -> dict[str, Tap]:
    """Undeclared modules, by the shape of what they pass on."""
    shapes: dict[str, tuple[torch.Size, int]] = {}
    clock = count(1)  # of every module call, as in _Search

    def visit(name: str, _: tuple[Any, ...], output: Any) -> None:  # noqa: ANN401
        now = next(clock)
        if name not in names:
            return
        if not isinstance(output, Tensor):
            raise ModelError(f"{name} passes a {type(output).__name__}, not a tensor", "tap a module that passes one tensor")
        if output.shape[:1] != images.shape[:1]:
            raise ModelError(f"{name} passes {tuple(output.shape)}, without the batch in front", "tap a module that keeps it there")
        if name in shapes:
            raise ModelError(f"{name} runs more than once in a forward pass", "tap a module that runs once, one around it say")
        shapes[name] = output.shape, now

    watch(model, images, visit)
    size = (images.shape[-2], images.shape[-1])
    # A model keeps its channels in one place: where a shape leaves it open, the other taps tell.
    last = any(len(shape) == 4 and layouts.channels_last(shape, size) for shape, _ in shapes.values())
    taps: dict[str, Tap] = {}
    for name, (shape, now) in shapes.items():
        layout, height, width = layouts.infer(shape, size, "nhwc" if last else "nchw")
        channels = shape[1] if layout.kind == "nchw" else shape[-1]
        taps[name] = Tap(Stage(name, channels, height, width, layout), size[0] / height, (now, ()))
    return taps


def find_taps(model: nn.Module, images: Tensor, names: Sequence[str]) -> tuple[list[Tap], list[str]]:
    """Every tap whose layout is certain, in the order in which they run, and what was left out."""
    declared = declarations(model, images, names)
    found = _proven(model, images, declared)
    named = [item.module for item in declared if item.grid is None]
    inferred = _inferred(model, images, named) if named else {}
    taps = sorted([*found.values(), *inferred.values()], key=lambda tap: tap.position)
    lost = [item.module for index, item in enumerate(declared) if index not in found and item.module not in inferred]
    if not taps or (names and lost):
        raise ModelError(
            f"the features of {type(model).__name__} at {', '.join(lost)} are not passed on by any module that runs once",
            "name other modules with taps = [...], or update timm",
        )
    return taps, [f"tap {name} is not passed on by any module and was left out" for name in lost]


# --- classifier -----------------------------------------------------------------------------------------------


def _classifiers(model: nn.Module, images: Tensor) -> list[nn.Module]:
    get = getattr(model, "get_classifier", None)
    declared = get() if callable(get) else _last_to_classify(model, images)
    parts = declared if isinstance(declared, tuple | list | nn.ModuleList) else [declared]
    return [_last_layer(part) for part in parts if isinstance(part, nn.Module)]


def _last_to_classify(model: nn.Module, images: Tensor) -> nn.Module | None:
    """Of a model that declares no classifier, the last layer to run that gives as many numbers per image as there are classes."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    ran: list[tuple[str, int]] = []

    def visit(name: str, _: tuple[Any, ...], output: Any) -> None:  # noqa: ANN401
        ran.append((name, output[0].numel() if isinstance(output, Tensor) and len(output) == _BATCH else 0))

    classes = watch(model, images, visit, tuple(layers))[0].numel() if layers else 0
    return next((layers[name] for name, numbers in reversed(ran) if numbers == classes), None)


def _last_layer(part: nn.Module) -> nn.Module:
    """A classifier may be declared as a whole head, with pooling and all."""
    return [part, *(module for module in part.modules() if isinstance(module, nn.Linear | nn.Conv2d))][-1]


def find_heads(model: nn.Module, images: Tensor) -> tuple[tuple[str, ...], int | None]:
    """Names of the classifier layers and the width of the vectors that enter them."""
    classifiers = _classifiers(model, images)
    names = tuple(name for name, module in model.named_modules() if any(module is part for part in classifiers))
    widths: dict[str, int | None] = {}

    def visit(name: str, inputs: tuple[Any, ...], _: Any) -> None:  # noqa: ANN401
        tensor = inputs[0] if inputs else None
        vector = isinstance(tensor, Tensor) and len(tensor) == _BATCH and tensor[0].numel() == max(tensor.shape[1:])
        widths[name] = tensor[0].numel() if vector and tensor is not None else None

    if names:
        watch(model, images, visit, names)
    found = [widths.get(name) for name in names]
    known = [width for width in found if width is not None]
    return (names, sum(known)) if known and len(known) == len(found) else ((), None)


def overwritten(model: nn.Module, images: Tensor, stages: Sequence[Stage]) -> set[str]:
    """Modules whose output is written over by in-place operations later."""
    seen: dict[str, list[tuple[Tensor, int]]] = {}

    def visit(name: str, _: tuple[Any, ...], output: Any) -> None:  # noqa: ANN401
        seen[name] = [(part, part._version) for _, part in layouts.leaves(output)]

    watch(model, images, visit, [stage.module for stage in stages])
    return {name for name, parts in seen.items() if any(part._version != version for part, version in parts)}
