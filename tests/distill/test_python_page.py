"""The loop on docs/python.md is one that works."""

from __future__ import annotations

import re
from pathlib import Path

import torch

PAGE = Path(__file__).parents[2] / "docs" / "python.md"


def test_the_loop_of_the_page_trains_the_student():
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL) if "loader" in block)
    torch.manual_seed(0)
    batch = torch.randn(4, 3, 224, 224), torch.tensor([0, 1, 2, 3])
    names: dict[str, object] = {"loader": [batch]}
    exec(compile(code.replace("epochs=20", "epochs=2"), str(PAGE), "exec"), names)
    losses = names["losses"]
    assert losses.terms.keys() == {"ce", "dist"}, "features teach in the first half"
    assert losses.total.isfinite()
    student, teacher = names["student"], names["teacher"]
    assert student.training
    assert student.fc.weight.grad.abs().sum() > 0
    assert not teacher.training
    assert all(parameter.grad is None for parameter in teacher.parameters())
