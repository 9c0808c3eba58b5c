"""Losses against identities and other people's arithmetic."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from fofa_deploy.distill.losses import decoupled_divergence, divergence, one_for_all_loss, relational_divergence

LABELS = torch.tensor([0, 3, 2, 4, 1, 1])


@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(0)
    return [3 * torch.randn(6, 5, generator=generator) for _ in range(2)]


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_dkd_decouples_kd(logits, temperature):
    """KL = TCKD + (1 - p_target) NCKD, per sample: equation 6 of arXiv 2203.08679."""
    for teacher, student, label in zip(*logits, LABELS, strict=True):
        one = teacher[None], student[None], label[None], temperature
        target, both = decoupled_divergence(*one, 0.0), decoupled_divergence(*one, 1.0)
        rest = 1 - torch.softmax(teacher / temperature, dim=0)[label]
        assert float(target + rest * (both - target)) == pytest.approx(float(divergence(*one[:2], temperature)), rel=1e-4)


def test_dkd_of_a_sure_teacher_is_finite(logits):
    student = logits[0].requires_grad_()
    teacher = 200.0 * functional.one_hot(LABELS, 5)
    loss = decoupled_divergence(teacher, student, LABELS, 1.0, 8.0)
    loss.backward()
    assert loss.isfinite()
    assert student.grad.isfinite().all()


def test_dist_is_one_minus_pearson(logits):
    teacher, student = (torch.softmax(part / 2, dim=1).numpy() for part in logits)
    rows = np.mean([1 - np.corrcoef(*pair)[0, 1] for pair in zip(teacher, student, strict=True)])
    columns = np.mean([1 - np.corrcoef(*pair)[0, 1] for pair in zip(teacher.T, student.T, strict=True)])
    assert float(relational_divergence(*logits, 2.0)) == pytest.approx(4 * (rows + columns), rel=1e-5)
    assert float(relational_divergence(logits[0], logits[0])) == pytest.approx(0, abs=1e-6)
    assert relational_divergence(logits[0][:1], logits[1][:1]).isfinite()


def test_ofa_with_exponent_one_is_the_teachers_cross_entropy(logits):
    """Without the labels' cross-entropy, which the objective adds, (1 + p) log q on the target is p log q, as elsewhere."""
    teacher, student = logits
    plain = functional.cross_entropy(student, torch.softmax(teacher, dim=1))
    assert float(one_for_all_loss(teacher, student, LABELS, 1.0)) == pytest.approx(float(plain), rel=1e-5)
    target = torch.softmax(teacher, dim=1).gather(1, LABELS[:, None])[:, 0]
    log = functional.log_softmax(student, dim=1).gather(1, LABELS[:, None])[:, 0]
    enhanced = plain - ((1 + target).square() - 1 - target).mul(log).mean()
    assert float(one_for_all_loss(teacher, student, LABELS, 2.0)) == pytest.approx(float(enhanced), rel=1e-5)
