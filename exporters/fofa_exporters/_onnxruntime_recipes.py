"""ONNX Runtime's recipes.

What they rest on (measured, see docs): only unsigned activations with signed per-channel weights are fast, and CPUs without
VNNI add pairs of u8 x s8 products in 16 bits that saturate. Two ways out of that, both offered there: seven-bit weights, and
the runtime's exact u8 x u8 kernels.
"""

from __future__ import annotations

import onnx

from fofa_deploy.types import HardwareProfile, Precision, Recipe
from fofa_exporters import _device, _onnx
from fofa_exporters._device import Products
from fofa_exporters._fused import fused
from fofa_exporters._quantization.recipes import SMOOTHING, grown

FP32 = Recipe(name="fp32", precision=Precision.FP32, description="the captured graph as it is")
FUSED = Recipe(
    name="fp32-fused",
    precision=Precision.FP32,
    description="the captured graph, attention and GELU by onnxruntime's own operators",
    options={"method": "fused"},
)
FP16 = Recipe(
    name="fp16",
    precision=Precision.FP16,
    description="weights and activations in half precision, fp32 in and out",
    options={"method": "typed"},
)
BF16 = Recipe(
    name="bf16",
    precision=Precision.BF16,
    description="weights and activations in bfloat16, fp32 in and out",
    options={"method": "typed"},
)
CUDA = [FP16, BF16, FP32]


def _dynamic(name: str, scales: str, **options: bool) -> Recipe:
    return Recipe(
        name=name,
        precision=Precision.INT8,
        description=f"weights of matrix products in int8 {scales}, activations quantized while running; needs no calibration",
        options={"method": "dynamic", "fused": True, **options},
    )


# One scale for a whole matrix spares the kernel work for each of its columns, and costs accuracy.
DYNAMIC = [
    _dynamic("int8-dynamic-matmul-per-tensor", "per tensor", per_tensor=True),
    _dynamic("int8-dynamic-matmul", "per channel"),
]


def _static(name: str, description: str, **options: bool) -> Recipe:
    return Recipe(
        name=name,
        precision=Precision.INT8,
        description=f"u8 activations, s8 weights per channel, Q/DQ; {description}",
        needs_calibration=True,
        options={"method": "static", "fused": True, **options},
    )


FULL = _static("int8-u8s8-per-channel", "full eight bits: for CPUs with VNNI or Arm dot products")
SEVEN = _static("int8-u8s7-per-channel", "weights in seven bits, which cannot saturate without VNNI", seven_bit_weights=True)
EXACT = _static("int8-u8s8-per-channel-exact", "run by the u8 x u8 kernels, exact without VNNI", exact_kernels=True)
_STATIC = {
    Products.EXACT: [FULL],
    # Full width on the fast kernels is as fast as seven bits and loses accuracy for nothing: not offered.
    Products.SATURATING: [SEVEN, EXACT],
    Products.UNKNOWN: [SEVEN, EXACT, FULL],
}


def on_cpu(profile: HardwareProfile, model: onnx.ModelProto) -> list[Recipe]:
    """For this processor and this model, the preferred first."""
    return [*_int8(profile, model), *([FUSED] if fused(model) is not model else []), FP32]


def _int8(profile: HardwareProfile, model: onnx.ModelProto) -> list[Recipe]:
    """A transformer quantizes the operands of its constant products only, and may find activation ranges while it runs."""
    saturating = _device.products(profile) is not Products.EXACT
    static = _STATIC[_device.products(profile)]
    if not _onnx.is_transformer(model):
        return grown(static)
    mostly_conv = _onnx.is_convolutional(model)
    products = grown([_weighted_only(recipe, mostly_conv) for recipe in static], smoothing=SMOOTHING)
    if mostly_conv:
        return products
    return [*(map(_seven_bit, DYNAMIC) if saturating else DYNAMIC), *products]


def _weighted_only(recipe: Recipe, conv_outputs: bool) -> Recipe:
    # A float output lets the runtime fuse dequantizing into the product instead of rounding between two floats. It has no
    # convolution like that: where they are most of the layers, their outputs are rounded, or they would all stay in float.
    options = {**recipe.options, "weighted_only": True, "float_outputs": True, "conv_outputs": conv_outputs}
    return recipe.model_copy(update={"name": f"{recipe.name}-weighted-only", "options": options})


def _seven_bit(recipe: Recipe) -> Recipe:
    return recipe.model_copy(update={"options": {**recipe.options, "seven_bit_weights": True}})
