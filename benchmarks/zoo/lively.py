"""Seeded weights under which a network tells its images apart, as trained networks do and freshly made ones often do not."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fofa_deploy.errors import ModelError

NOISE = 0.1
"""Of every parameter that is no product's weight: no gate, token, scale or residual branch stays at the constant it starts at."""
LEAST_SPREAD = 0.1
"""Of healthy logits over the images; float32 rounds at 1e-7 and agrees between runtimes to 1e-5."""
PRODUCTS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@torch.no_grad()
def enliven(model: nn.Module, images: Tensor) -> float:
    """Give a network (left in eval mode) data-dependent weights, and tell how its logits differ between images.

    Every product is normal with variance 1 / fan-in, then scaled and shifted so that each of its outputs has mean 0 and
    variance 1 over the images (Salimans & Kingma 2016, arXiv 1602.07868, section 3), and equal tokens count once: in windows
    that are mostly padding, the few others would be scaled up until attention turns rounding into another answer. Batch
    normalization takes the images' statistics; everything else gets noise of `NOISE`.

    Args:
        images: float32 (B,C,H,W), at least two and different ones.

    Returns:
        standard deviation of the logits over the images, over their root mean square: 0 = constant, 1 = all difference.

    Raises:
        ModelError: not finite, or below `LEAST_SPREAD`.
    """
    generator = torch.Generator().manual_seed(0)
    products = [module for module in model.eval().modules() if isinstance(module, PRODUCTS)]
    weights = {id(product.weight) for product in products}
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if id(parameter) in weights:
            parameter.copy_(noise * max(1, parameter[0].numel()) ** -0.5)
        else:
            parameter.add_(NOISE * noise)
    _settle(model, products, images)
    logits = model(images)
    spread = float(logits.std(0).square().mean().sqrt() / logits.square().mean().sqrt())
    if not (logits.isfinite().all() and spread >= LEAST_SPREAD):
        raise ModelError(f"the logits' spread over {len(images)} images is {spread:.2g}", "look at the model's own initialization")
    return spread


def _settle(model: nn.Module, products: list[nn.Module], images: Tensor) -> None:
    """One pass in which every product and every batch normalization takes the statistics of its own inputs."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean over batches, of which there is one
        norm.train()
    hooks = {product: product.register_forward_hook(lambda *told: _standardize(hooks, *told)) for product in products}
    model(images)
    for hook in hooks.values():
        hook.remove()
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()


def _standardize(hooks: dict, product: nn.Module, inputs: tuple[Tensor, ...], outputs: Tensor) -> Tensor:
    """The product's outputs as they are with its new weights; its first use counts where it is used more than once."""
    hooks.pop(product).remove()
    rows = _distinct(inputs[0], outputs) if isinstance(product, nn.Linear) else outputs.transpose(0, 1).flatten(1).T
    mean, std = rows.mean(0), rows.std(0)
    std = std.clamp_min(float(0.1 * rows.std()) or 1.0)  # a dead channel stays one
    product.weight.div_(std.view(-1, *[1] * (product.weight.ndim - 1)))
    if product.bias is not None:
        product.bias.sub_(mean).div_(std)
    return product(*inputs)


def _distinct(inputs: Tensor, outputs: Tensor) -> Tensor:
    """Outputs (N,K) of the tokens (...,C) that are not equal to one before; all where there is but one."""
    places: dict[bytes, int] = {}
    for place, token in enumerate(inputs.flatten(0, -2).contiguous().numpy()):
        places.setdefault(token.tobytes(), place)
    rows = outputs.flatten(0, -2)
    return rows[list(places.values())] if len(places) > 1 else rows
