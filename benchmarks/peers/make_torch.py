"""What PyTorch and torchao make of the model: docs.pytorch.org, torch.compile; docs.pytorch.org/ao, quantization.

Their models are code: what is kept is the weights, or the exported program, and `backends.py` compiles it where it is run.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from make import Job, images


def weights(job: Job, out: Path) -> Path:
    shutil.copyfile(job["weights"], out / "model.safetensors")
    return out / "model.safetensors"


def pt2e_static(job: Job, out: Path) -> Path:
    """Static int8 by the X86 quantizer's default configuration."""
    return _pt2e(job, out, dynamic=False)


def pt2e_dynamic(job: Job, out: Path) -> Path:
    """Dynamic int8 by the same: activations are quantized while running."""
    return _pt2e(job, out, dynamic=True)


def _pt2e(job: Job, out: Path, dynamic: bool) -> Path:
    import torchao.quantization.pt2e.quantizer.x86_inductor_quantizer as x86
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    samples = [torch.from_numpy(feeds[job["input"]]) for feeds in images(job)]
    with torch.no_grad():
        exported = torch.export.export(network(job), (samples[0],)).module()
        config = x86.get_default_x86_inductor_quantization_config(is_dynamic=dynamic)
        prepared = prepare_pt2e(exported, x86.X86InductorQuantizer().set_global(config))
        for sample in samples:
            prepared(sample)
        program = torch.export.export(convert_pt2e(prepared), (samples[0],))
    torch.export.save(program, out / "model.pt2")
    return out / "model.pt2"


def network(job: Job) -> torch.nn.Module:
    """The model in eval mode, from timm and the weights."""
    import timm
    from safetensors.torch import load_file

    model = timm.create_model(job["model"], **job["arguments"])
    model.load_state_dict(load_file(job["weights"]))
    return model.eval()
