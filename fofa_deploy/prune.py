"""Structured pruning: the same share of channels out of every layer, the weakest first. Shapes follow from the plan alone.

Channels that depend on each other (through residual sums, norms, heads) go together, after Fang et al., "DepGraph: Towards Any
Structural Pruning" (arXiv 2301.12900), by their own library. A timm model's ``feature_info`` goes on telling the channels that
were: features are found by running the model (`fofa_deploy.distill.probe`), which takes names and reductions alone from there.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fofa_deploy.errors import ModelError

MULTIPLE = 8
"""Channels are rounded down to multiples of this: what vector units and int8 kernels work in."""

MOST = 2.0
"""Times its share that rounding may take out of a layer: one with too few channels for that stays as it is."""

PRUNING_VERSION = 2
"""Raised when the same plan comes to other shapes."""

FAULTS = (RuntimeError, TypeError, ValueError, AssertionError, LookupError, AttributeError, ArithmeticError)
"""What a network raises that does not take its images, cannot be traced, or has lost the wrong channels."""

ACTION = "choose another network, scale its width (docs/compression.md), or set prune = 0"


def prune(model: nn.Module, share: float, image_shape: tuple[int, int, int], name: str) -> None:
    """Take ``share`` of the channels out of every layer of the model, in place; its logits keep their number.

    Args:
        image_shape: (C,H,W) of what the model is for.
        name: the model's, for messages.

    Raises:
        ModelError: the model cannot be pruned, or into shapes that the weights decide.
    """
    images = torch.randn(2, *image_shape, generator=torch.Generator().manual_seed(0))
    # Another process makes the same network from other weights, and loads these strictly: the shapes must not hang on them.
    twin = _redrawn(copy.deepcopy(model))
    before = _shapes(model)
    try:
        wanted = _logits(model, images).shape
        for network in (twin, model):
            _cut(network, share, images)
        found = _logits(model, images).shape
    except FAULTS as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"{name} cannot be pruned by {share:.0%}: {reason}", ACTION) from error
    if found != wanted:
        raise ModelError(f"{name} cannot be pruned by {share:.0%}: its logits would be {tuple(found)}, not {tuple(wanted)}", ACTION)
    if _shapes(model) != _shapes(twin):
        raise ModelError(f"{name} cannot be pruned by {share:.0%}: the shapes that are left would hang on its weights", ACTION)
    if _shapes(model) == before:
        raise ModelError(f"{name} has nothing to prune by {share:.0%}: no layer can lose {MULTIPLE} channels", ACTION)


def _redrawn(model: nn.Module) -> nn.Module:
    """The model with other weights; the global random state stays."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    return model


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {key: value.shape for key, value in model.state_dict().items()}


def _logits(model: nn.Module, images: Tensor) -> Tensor:
    with evaluating(model), torch.no_grad():
        logits = model(images)
    if not isinstance(logits, Tensor):
        raise TypeError(f"it passes a {type(logits).__name__}, not logits")
    return logits


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; every module's own mode afterwards."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _cut(model: nn.Module, share: float, images: Tensor) -> None:
    import torch_pruning as tp

    attentions = [module for module in model.modules() if isinstance(getattr(module, "qkv", None), nn.Linear)]
    heads = {module.qkv: module.num_heads for module in attentions}
    with evaluating(model), torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it tells of every parameter that is not inside a layer, and handles it
        pruner = tp.pruner.BasePruner(
            model,
            images,
            importance=tp.importance.GroupMagnitudeImportance(p=2),
            pruning_ratio=share,
            round_to=MULTIPLE,
            num_heads=heads,
            in_channel_groups={},  # its defaults are shared between calls
            out_channel_groups={},
            forward_fn=lambda network, batch: network(batch),
            output_transform=lambda logits: logits + 0,  # a step of its own, by which the classifier is told
        )
        for group in pruner.step(interactive=True):
            (first, channels), *_ = group
            lost = len(channels) / pruner.DG.get_out_channels(first.target.module)
            if lost <= MOST * share and not any(dep.target.type == tp.ops.OPTYPE.OUTPUT for dep, _ in group):
                group.prune()
    for module in attentions:
        _refit(module)


def _refit(attention: nn.Module) -> None:
    """Attention keeps its heads, narrower ones; what it remembers of their width follows."""
    qkv, heads = attention.qkv, attention.num_heads
    assert isinstance(qkv, nn.Linear)
    assert isinstance(heads, int)
    width = qkv.out_features // 3
    known = {"head_dim": width // heads, "attn_dim": width, "scale": (width // heads) ** -0.5}
    for name, value in known.items():
        if hasattr(attention, name):
            setattr(attention, name, value)
