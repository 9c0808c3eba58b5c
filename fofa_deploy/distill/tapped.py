"""Features of any model, taken (and bent) by hooks on the ordinary forward pass.

No forward is rewritten: logits are the ordinary logits, and a prompt replaces what a module passes on. Which modules
is declared by the model (timm's ``feature_info``); how they lay features out is proven when the model is tapped, by
comparing a probe batch with ``forward_intermediates`` (see :mod:`fofa_deploy.distill.probe`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fofa_deploy.distill import layouts
from fofa_deploy.distill.layouts import Layout
from fofa_deploy.errors import ModelError

Prompt = Callable[[Tensor], Tensor]  # (B, C, H, W) -> (B, C, H, W)


@dataclass(frozen=True, slots=True)
class Stage:
    """One place in a model where a grid can be read or replaced.

    Args:
        module: name in ``model.named_modules()``.
        height: of the grid at the image size of the probe.
        before: the grid is what enters the module, not what leaves it.
        copy: the model writes over this tensor later, so it is copied when it is read.
    """

    module: str
    channels: int
    height: int
    width: int
    layout: Layout
    before: bool = False
    copy: bool = False

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.channels, self.height, self.width

    def to_grid(self, raw: Any) -> Tensor:  # noqa: ANN401 - modules pass tensors, tuples and lists
        """What the module passes on -> (B, C, H, W)."""
        tensor = layouts.select(raw, self.layout.path)
        return layouts.to_grid(tensor.clone() if self.copy else tensor, self.layout, self.height, self.width)

    def from_grid(self, grid: Tensor, raw: Any) -> Any:  # noqa: ANN401
        """Exact inverse: ``raw`` with its grid replaced and its prefix tokens back in front."""
        tensor = layouts.from_grid(grid, layouts.select(raw, self.layout.path), self.layout)
        return layouts.substitute(raw, self.layout.path, tensor)


class Features(NamedTuple):
    """Logits (B, K), one map (B, C, H, W) per stage, and the input of the classifier layer (B, D) where there is one."""

    logits: Tensor
    maps: tuple[Tensor, ...]
    embedding: Tensor | None


def read(module: nn.Module, stage: Stage, sink: Callable[[Tensor], None]) -> torch.utils.hooks.RemovableHandle:
    """Call ``sink`` with the stage's grid whenever the module runs."""
    if stage.before:
        return module.register_forward_pre_hook(lambda _, inputs: sink(stage.to_grid(inputs)))
    return module.register_forward_hook(lambda _, inputs, output: sink(stage.to_grid(output)))


def bend(module: nn.Module, stage: Stage, prompt: Prompt) -> torch.utils.hooks.RemovableHandle:
    """Replace the stage's grid by ``prompt(grid)`` whenever the module runs."""

    def bent(raw: Any) -> Any:  # noqa: ANN401
        return stage.from_grid(prompt(stage.to_grid(raw)), raw)

    if stage.before:
        return module.register_forward_pre_hook(lambda _, inputs: bent(inputs))
    return module.register_forward_hook(lambda _, inputs, output: bent(output))


class TappedModel(nn.Module):
    """A model, unchanged, with named places to read and bend its features.

    Hooks exist only while ``forward`` runs: before and after, the model can be pickled, copied and exported as ever.
    ``.model.state_dict()`` is the model's own.

    Args:
        stages: where features are read, shallow to deep.
        entries: what enters each stage, where a prompt goes; None = it cannot be told apart, and the stage not be prompted.
        heads: names of the classifier layers, whose input is the embedding.
        classes: K, width of the logits.
        embedding_width: D, or None where the model has no classifier layer with a vector input.
    """

    def __init__(
        self,
        model: nn.Module,
        stages: tuple[Stage, ...],
        entries: tuple[Stage | None, ...],
        heads: tuple[str, ...] = (),
        classes: int = 0,
        embedding_width: int | None = None,
        notices: tuple[str, ...] = (),
    ) -> None:
        super().__init__()
        self.model = model
        self.stages, self.entries, self.heads = stages, entries, heads
        self.classes, self.embedding_width, self.notices = classes, embedding_width, notices

    def forward(self, images: Tensor, prompts: Mapping[int, Prompt] | None = None) -> Features:
        """Images (B, C, H, W) -> features; ``prompts[i]`` bends what enters ``stages[i]``.

        A stage's map is what left the stage, before the next stage's prompt.
        """
        maps: dict[int, Tensor] = {}
        vectors: dict[str, Tensor] = {}
        with ExitStack() as hooks:
            for index, stage in enumerate(self.stages):
                hooks.enter_context(read(self._at(stage), stage, _put(maps, index)))
            for index, prompt in (prompts or {}).items():
                entry = self._entry(index)
                hooks.enter_context(bend(self._at(entry), entry, prompt))
            for name in self.heads:
                hooks.enter_context(self.model.get_submodule(name).register_forward_pre_hook(_keep(vectors, name)))
            logits = self.model(images)
        if not isinstance(logits, Tensor):
            raise ModelError(
                f"{type(self.model).__name__} passes a {type(logits).__name__} in place of logits (in training mode, say)",
                "build it without auxiliary classifiers, or wrap it so that forward() passes one tensor",
            )
        return Features(logits, tuple(maps[i] for i in range(len(self.stages))), self._embedding(vectors))

    def _at(self, stage: Stage) -> nn.Module:
        return self.model.get_submodule(stage.module)

    def _entry(self, index: int) -> Stage:
        entry = self.entries[index]
        if entry is None:
            raise ModelError(f"stage {index + 1} of this model cannot be prompted", "leave it out of prompted_stages")
        return entry

    def _embedding(self, vectors: Mapping[str, Tensor]) -> Tensor | None:
        if self.embedding_width is None:
            return None
        return torch.cat([vectors[name].flatten(1) for name in self.heads], dim=1)


def _put(maps: dict[int, Tensor], index: int) -> Callable[[Tensor], None]:
    return lambda grid: maps.__setitem__(index, grid)


def _keep(vectors: dict[str, Tensor], name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    return lambda _, inputs: vectors.__setitem__(name, inputs[0])
