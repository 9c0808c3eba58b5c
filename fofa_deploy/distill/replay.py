"""The prompted pass without what comes before the first prompt: there it would only compute the plain pass again.

What the plain pass computed before that point is kept for the step and handed out when the prompted pass asks for it.
Which modules that is depends on the model alone and is found once, on a probe, by the order in which they finish.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fofa_deploy.distill.tapped import TappedModel


@dataclass
class _Call:
    """One module's one call: what it returned, and that tensor's version then (in-place writes raise it)."""

    output: Any
    version: int


class Prefix:
    """The outermost modules of ``teacher`` that finish before what enters stage ``first`` is bent.

    A module is left out, and computed twice, where handing out its result would not be the same: it runs more than once,
    returns anything but a tensor, is written over later, has a tap inside, or lies inside of what was compiled. Where the
    prompted pass sees the first part of the batch alone, what is not one row per image (windows of Swin, a table of
    positions) is left out, too.

    Args:
        teacher: frozen, in eval mode.
        images: a probe (1, C, H, W).
        whole: the prompted pass sees the whole batch.
    """

    def __init__(self, teacher: TappedModel, first: int, images: Tensor, whole: bool = True) -> None:
        self._model = teacher.model
        self.names = _outermost(_safe(teacher, first, images, whole))
        self._first, self._whole = first, whole
        self._kept: dict[str, Tensor] = {}
        self._images = images[:0]

    @contextmanager
    def recording(self, images: Tensor) -> Iterator[None]:
        """Keep what the prefix returns while the teacher runs on ``images``."""
        self._images = images

        def keep(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
            return lambda _, inputs, output: self._kept.__setitem__(name, output)

        with ExitStack() as hooks:
            for name in self.names:
                hooks.enter_context(self._model.get_submodule(name).register_forward_hook(keep(name)))
            yield

    def knows(self, images: Tensor, prompts: Mapping[int, object]) -> bool:
        """Whether what was kept is what a pass over ``images`` computes: the same ones or their front, bent no earlier."""
        same = all(ask(images) == ask(self._images) for ask in (Tensor.data_ptr, Tensor.stride, lambda seen: seen.shape[1:]))
        count = len(images) == len(self._images) if self._whole else 0 < len(images) <= len(self._images)
        return same and count and min(prompts, default=-1) >= self._first

    @contextmanager
    def replaying(self, images: Tensor) -> Iterator[None]:
        """Hand out what was kept of ``images``, which it `knows`, instead of computing it; hooks run as ever. Then forget it."""
        count = None if self._whole else len(images)  # of the whole batch, also what is not one row per image
        modules = {name: self._model.get_submodule(name) for name in self.names if name in self._kept}
        own = {name: vars(module)["forward"] for name, module in modules.items() if "forward" in vars(module)}  # compiled, say
        for name, module in modules.items():
            module.forward = _constant(self._kept[name] if count is None else self._kept[name][:count])  # type: ignore[method-assign]
        try:
            yield
        finally:
            for name, module in modules.items():
                del module.forward
                if name in own:
                    module.forward = own[name]  # type: ignore[method-assign]
            self._kept, self._images = {}, self._images[:0]


def _constant(output: Tensor) -> Callable[..., Tensor]:
    return lambda *_, **__: output


@torch.no_grad()
def _safe(teacher: TappedModel, first: int, images: Tensor, whole: bool) -> list[str]:
    """Names of all modules, in the order in which they finish, that may be replayed."""
    entry = teacher.entries[first]
    if entry is None:
        return []
    calls: dict[str, list[_Call]] = {}
    bent_at: list[set[str]] = []

    def note(name: str) -> Callable[[nn.Module, Any, Any], None]:
        return lambda _, inputs, output: calls.setdefault(name, []).append(
            _Call(output, output._version if isinstance(output, Tensor) else -1)
        )

    with _uncompiled(teacher.model), ExitStack() as hooks:
        for name, module in teacher.model.named_modules():
            if name:
                hooks.enter_context(module.register_forward_hook(note(name)))
        target = teacher.model.get_submodule(entry.module)
        if entry.before:
            hooks.enter_context(target.register_forward_pre_hook(lambda *_: bent_at.append(set(calls))))
        else:
            hooks.enter_context(target.register_forward_hook(lambda *_: bent_at.append(set(calls))))
        teacher.model(images)
    before = bent_at[0] if bent_at else set()
    tapped = [stage.module for stage in teacher.stages]
    kernels = [name for name, module in teacher.model.named_modules() if "forward" in vars(module)]
    candidates = [name for name in calls if name in before and not any(_holds(kernel, [name]) for kernel in kernels)]
    safe = [name for name in candidates if _replayable(calls[name]) and not _holds(name, tapped)]
    return safe if whole else [name for name in safe if calls[name][0].output.shape[:1] == images.shape[:1]]


def _uncompiled(model: nn.Module) -> AbstractContextManager[None]:
    """Let hooks run inside what torch.compile made one kernel of, without compiling it for them."""
    compiled = any("forward" in vars(module) for module in model.modules())
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()


def _replayable(calls: list[_Call]) -> bool:
    output = calls[0].output
    return len(calls) == 1 and isinstance(output, Tensor) and output._version == calls[0].version


def _holds(name: str, tapped: list[str]) -> bool:
    return any(module.startswith(f"{name}.") for module in tapped)


def _outermost(names: list[str]) -> tuple[str, ...]:
    return tuple(name for name in names if not any(name.startswith(f"{other}.") for other in names))
