"""Accuracy and fidelity, against figures that can be checked by hand."""

import numpy as np
import pytest

from fofa_deploy.metrics import best_order, compare, topk

LOGITS = np.array([[0.1, 0.9, 0.0], [0.8, 0.1, 0.1], [0.2, 0.3, 0.5], [0.4, 0.5, 0.1]], np.float32)
LABELS = np.array([1, 0, 0, 0])


@pytest.mark.parametrize(("k", "share"), [(1, 0.5), (2, 0.75), (3, 1.0), (5, 1.0)])
def test_topk_by_hand(k, share):
    assert topk(LOGITS, LABELS, k) == share


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_no_hit(poison):
    assert topk(np.full((4, 3), poison, np.float32), LABELS, 3) == 0.0
    spoilt = LOGITS.copy()
    spoilt[0, 1] = poison
    assert topk(spoilt, LABELS, 3) == 0.75


def test_nan_elsewhere_does_not_hide_a_hit():
    spoilt = LOGITS.copy()
    spoilt[0, 0] = np.nan
    assert topk(spoilt, LABELS, 1) == 0.5


def test_logits_equal_themselves():
    found = compare(LOGITS, LOGITS, LABELS)
    assert (found.samples, found.finite, found.top1, found.agreement) == (4, True, 0.5, 1.0)
    assert (found.max_abs_error, found.relative_error) == (0.0, 0.0)
    assert found.cosine == pytest.approx(1.0)


def test_errors_by_hand():
    found = compare(np.array([[3.0, 4.0]], np.float32), np.array([[3.0, 3.0]], np.float32), None)
    assert found.max_abs_error == 1.0
    assert found.relative_error == pytest.approx(1 / np.sqrt(18))
    assert found.cosine == pytest.approx(21 / (5 * np.sqrt(18)))
    assert (found.top1, found.top5) == (None, None)


def test_agreement_counts_classes_and_not_values():
    assert compare(LOGITS * 2, LOGITS, None).agreement == 1.0
    assert compare(-LOGITS, LOGITS, None).agreement == 0.0


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_one_poisoned_logit_leaves_nothing_to_compare(poison):
    spoilt = LOGITS.copy()
    spoilt[3, 2] = poison
    found = compare(spoilt, LOGITS, LABELS)
    assert (found.finite, found.agreement) == (False, 0.0)
    assert (found.cosine, found.max_abs_error, found.relative_error) == (None, None, None)


def test_zeros_divide_nothing_by_zero():
    zeros = np.zeros((2, 3), np.float32)
    assert compare(zeros, zeros, None).relative_error == 0.0
    assert compare(zeros, LOGITS[:2], None).cosine == 0.0


def test_one_class_is_always_right():
    assert topk(np.ones((3, 1), np.float32), np.zeros(3, np.int64), 5) == 1.0


def test_the_best_order_of_classes_is_found():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 5, 200)
    logits = np.eye(5, dtype=np.float32)[labels] + rng.normal(0, 0.1, (200, 5)).astype(np.float32)
    order = np.array([0, 3, 1, 2, 4])
    moved = np.empty_like(logits)
    moved[:, order] = logits  # what was logit i is now logit order[i]
    assert topk(moved, labels, 1) < 0.6
    assert best_order(moved, labels).tolist() == order.tolist()
    assert topk(moved[:, order], labels, 1) == 1.0
    assert best_order(logits[:7], labels[:7]).tolist() == [0, 1, 2, 3, 4]
