"""``tap(model, image_shape)``: stages of any model, chosen by resolution or depth, and the places to prompt before them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fofa_deploy.distill import layouts
from fofa_deploy.distill.probe import Tap, find_heads, find_taps, frozen_in_eval, overwritten, probe_images
from fofa_deploy.distill.tapped import Features, Prompt, Stage, TappedModel, bend, read
from fofa_deploy.errors import ModelError

__all__ = ["Features", "Stage", "TappedModel", "tap"]


def evenly(count: int, wanted: int) -> list[int]:
    """``wanted`` of ``count`` indices (all, if there are fewer), evenly spaced and ending at the last."""
    wanted = min(count, wanted)
    return [-(-(place + 1) * count // wanted) - 1 for place in range(wanted)]


def choose(taps: Sequence[Tap], stages: int) -> list[int]:
    """Indices of the taps that end a stage.

    Hierarchical models: the last tap of each of the deepest resolutions. Others: evenly by depth. Either ends at the last tap.
    """
    ends = {tap.reduction: index for index, tap in enumerate(taps)}
    if len(ends) >= stages:
        return sorted(ends.values())[-stages:]
    return evenly(len(taps), stages)


def _first_start(model: nn.Module, images: Tensor, stage: Stage) -> tuple[str, tuple[Any, ...]] | None:
    """The module within the stage's that starts first, and what enters it."""
    root = stage.module
    starts: list[tuple[str, tuple[Any, ...]]] = []
    with ExitStack() as hooks:
        for name, module in model.named_modules():
            if f"{name}.".startswith(f"{root}."):
                hooks.enter_context(module.register_forward_pre_hook(lambda _, args, name=name: starts.append((name, args))))
        model(images)
    return starts[0] if starts else None


def _fitting(stage: Stage, tensor: Tensor) -> Stage | None:
    """The stage's own grid in a tensor of its size, or a larger 4-D map of its layout; None where the shape fits neither."""
    grid = torch.Size((tensor.shape[0], *stage.shape))
    fits = [layout for layout in layouts.plausible(tensor.shape, grid) if layout.prefix == stage.layout.prefix]
    alike = [layout for layout in fits if layout.kind == stage.layout.kind]
    if alike or len(fits) == 1:
        return replace(stage, layout=replace((alike or fits)[0], order=stage.layout.order))
    if tensor.ndim != 4 or stage.layout.kind not in ("nchw", "nhwc"):
        return None
    channels, height, width = layouts.to_grid(tensor, stage.layout, 0, 0).shape[1:]
    larger = height % stage.height == 0 and height // stage.height == width / stage.width
    return replace(stage, channels=channels, height=height, width=width) if larger else None


def _entry_before(model: nn.Module, images: Tensor, tap: Stage) -> Stage | None:
    """What enters the tap's module, where it is laid out like what leaves it."""
    start = _first_start(model, images, tap)
    if start is None:
        return None
    # A pre-hook sees the tuple of positional arguments; one of them may be a list of what the module passes on.
    tensors = dict(layouts.leaves(start[1]))
    paths = (tap.layout.path or (0,), (0, *tap.layout.path))
    fits = [(path, _fitting(tap, tensors[path])) for path in paths if path in tensors]
    entries = [replace(fit, module=start[0], layout=replace(fit.layout, path=path), before=True) for path, fit in fits if fit]
    return next(iter(entries), None)


def _nearest(earlier: Sequence[Tap], tap: Tap) -> Stage | None:
    """The last of the earlier taps whose module is done before the tap's runs; of the same branch, if there are branches.

    A tensor that is passed on by itself is of no branch: what came last leads to it.
    """
    before = [other.stage for other in earlier if other.position[0] < tap.position[0]]
    path = tap.stage.layout.path
    branch = [stage for stage in before if path and stage.layout.path == path]
    return (branch or before)[-1] if before else None


def _reaches(model: nn.Module, images: Tensor, entry: Stage, stage: Stage) -> bool:
    """Whether what is done to the entry shows in the stage: branches run side by side in some models."""

    def run(prompt: Prompt) -> Tensor:
        seen: list[Tensor] = []
        bent = bend(model.get_submodule(entry.module), entry, prompt)
        with bent, read(model.get_submodule(stage.module), stage, seen.append):
            model(images)
        return seen[0]

    # Neither a shift nor a scale: normalization would undo them.
    return not torch.equal(run(lambda grid: grid), run(lambda grid: grid.flip(1)))


def _entry(
    model: nn.Module, images: Tensor, taps: Sequence[Tap], span: tuple[int, int], used: Sequence[Stage | None]
) -> Stage | None:
    """What enters the stage of the taps first..end: the tap before it, else the input of its first or its last module."""
    first, end = span
    near = _nearest(taps[:first], taps[end])
    for index in (-1, first, end):
        entry = near if index < 0 else _entry_before(model, images, taps[index].stage)
        if entry is not None and entry not in used and _reaches(model, images, entry, taps[end].stage):
            return entry
    return None


def _entries(model: nn.Module, images: Tensor, taps: Sequence[Tap], ends: Sequence[int]) -> tuple[Stage | None, ...]:
    """Per stage, a place of its own."""
    hierarchical = len({tap.reduction for tap in taps}) > 1
    first = next(index for index in range(ends[0] + 1) if not hierarchical or taps[index].reduction == taps[ends[0]].reduction)
    entries: list[Stage | None] = []
    for span in zip((first, *(end + 1 for end in ends)), ends, strict=False):
        entries.append(_entry(model, images, taps, span, entries))
    return tuple(entries)


def _count_classes(model: nn.Module, images: Tensor) -> int:
    logits = model(images)
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        raise ModelError(f"{type(model).__name__} does not pass logits of shape (B, classes)", "use a plain classifier")
    if not logits.isfinite().all():
        raise ModelError(
            f"{type(model).__name__} passes logits that are not finite", "its weights are broken: use another checkpoint"
        )
    return logits.shape[1]


def tap(model: nn.Module, image_shape: tuple[int, int, int], stages: int = 4, names: Sequence[str] = ()) -> TappedModel:
    """Tap a model for images of shape (C, H, W).

    Declared features (timm) need no names. A model with fewer taps than ``stages`` has fewer stages.

    Args:
        stages: how many; with 0 nothing needs to be declared or named.
        names: modules to tap, for models that declare nothing or to overrule what is declared.

    Raises:
        ModelError: nothing is declared or named, or a layout cannot be established.
    """
    images = probe_images(model, image_shape)
    with frozen_in_eval(model):
        classes = _count_classes(model, images)
        heads, width = find_heads(model, images)
        if not stages:
            return TappedModel(model, (), (), heads, classes, width)
        taps, notices = find_taps(model, images, names)
        ends = choose(taps, stages)
        written = overwritten(model, images, [taps[end].stage for end in ends])
        entries = _entries(model, images, taps, ends)
    chosen = tuple(replace(taps[end].stage, copy=taps[end].stage.module in written) for end in ends)
    return TappedModel(model, chosen, entries, heads, classes, width, tuple(notices))
