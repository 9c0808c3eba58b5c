"""The loop on docs/python.md is one that works."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

PAGE = Path(__file__).parents[2] / "docs" / "python.md"

CLIPPING = "torch.nn.utils.clip_grad_norm_(objective.parameters(), plan.clip_norm)"
GROWN = 0.5
"""Of the weights of a classifier that learns."""


def run(names: dict[str, object], **changed: str) -> None:
    """The page's loop, with some of its words changed."""
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL) if "loader" in block)
    for word, other in changed.items():
        assert word in code
        code = code.replace(word, other)
    exec(compile(code, str(PAGE), "exec"), names)


def test_the_loop_of_the_page_trains_the_student():
    torch.manual_seed(0)
    names: dict[str, object] = {"loader": [(torch.randn(4, 3, 224, 224), torch.tensor([0, 1, 2, 3]))]}
    run(names, **{"epochs=20": "epochs=2"})
    losses = names["losses"]
    assert losses.terms.keys() == {"ce", "dist"}, "features teach in the first half"
    assert losses.total.isfinite()
    student, teacher = names["student"], names["teacher"]
    assert student.training
    assert student.fc.weight.grad.abs().sum() > 0
    assert not teacher.training
    assert all(parameter.grad is None for parameter in teacher.parameters())


@pytest.mark.parametrize("clipping", [CLIPPING, "pass"])
def test_a_classifier_that_starts_at_zero_learns_by_the_clipping(clipping):
    """Of constant answers a correlation's gradient is a millionfold, which the optimizer would remember."""
    torch.manual_seed(0)
    images, labels = torch.randn(16, 3, 32, 32), torch.arange(16) % 4
    images += labels[:, None, None, None]

    def student() -> nn.Module:
        model = timm.create_model("test_resnet", num_classes=10)
        nn.init.zeros_(model.get_classifier().weight)
        nn.init.zeros_(model.get_classifier().bias)
        return model

    names: dict[str, object] = {"loader": [(images, labels)] * 10, "made": student()}
    changed = {
        CLIPPING: clipping,
        'timm.create_model("resnet18", num_classes=10)': "made",
        "convnext_tiny": "test_convnext",
        "224, 224": "32, 32",
    }
    run(names, **changed, **{"epochs=20": "epochs=5"})
    assert (names["made"].get_classifier().weight.norm() > GROWN) == (clipping == CLIPPING)
