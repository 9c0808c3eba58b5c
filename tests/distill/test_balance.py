"""Every term moves the student as much as the labels do, without a weight being set."""

import copy

import pytest
import torch
from torch import nn

from fofa_deploy.distill.balance import GradientBalance, _gradient_norm

EVERY = 5


def norm(term, parameters):
    gradients = torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True)
    return torch.cat([gradient.flatten() for gradient in gradients if gradient is not None]).norm()


def test_scaled_gradients_are_equal(objective, batch):
    made = objective("vit", "cnn", method="fofa+rsd", balance="gradient", fofa={"prompted_stages": ()}).train()
    parameters = list(made.student.parameters())
    images, labels = batch("vit")
    student = made.student(images)
    terms = {"ce": torch.nn.functional.cross_entropy(student.logits, labels)}
    lesson = made._lesson(images, labels, student)
    for term in made.terms.values():
        terms |= term(lesson)
    scales = made.balance(terms, parameters)
    assert set(scales) == {"kd", "fofa", "rsd"}
    expected = float(norm(terms["ce"], parameters))
    for name, scale in scales.items():
        assert float(norm(scale * terms[name], parameters)) == pytest.approx(expected, rel=1e-3)


def test_whatever_the_scale_of_a_term_it_counts_alike():
    weight = torch.nn.Parameter(torch.ones(3))
    balance = GradientBalance(["small", "large"], EVERY).train()
    for _ in range(2 * EVERY):
        scales = balance({"ce": weight.sum(), "small": weight.sum() / 50, "large": 70 * weight.sum()}, [weight])
    assert float(scales["small"]) == pytest.approx(50)
    assert float(scales["large"]) == pytest.approx(1 / 70)


def test_one_measurement_beyond_all_others_is_soon_forgotten():
    weight = torch.nn.Parameter(torch.ones(3))
    balance = GradientBalance(["correlation"], EVERY).train()
    for step in range(200):
        scales = balance({"ce": weight.sum(), "correlation": (1e7 if step == 0 else 1.0) * weight.sum()}, [weight])
    assert float(scales["correlation"]) > 0.3


def test_passes_that_share_a_step_are_measured_once():
    weight = torch.nn.Parameter(torch.ones(1))
    balance = GradientBalance(["other"], EVERY, passes=4).train()
    losses = ({"ce": weight.sum(), "other": (1.0 + step) * weight.sum()} for step in range(4 * EVERY + 1))
    found = [float(balance(terms, [weight])["other"]) for terms in losses]
    assert len(set(found[:-1])) == 1
    assert found[-1] != found[0]


def test_a_term_without_gradient_is_not_scaled_and_leaves_the_others_balanced():
    weight = torch.nn.Parameter(torch.ones(3))
    terms = {"ce": weight.sum(), "silent": 0 * weight.sum(), "loud": 4 * weight.sum()}
    scales = GradientBalance(["silent", "loud"], EVERY).train()(terms, [weight])
    assert float(scales["silent"]) == 1.0
    assert float(scales["loud"]) == pytest.approx(1 / 4)


def test_a_term_that_does_not_reach_the_student_leaves_the_others_balanced():
    weight, other = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2))
    terms = {"ce": weight.sum(), "constant": torch.zeros(()), "elsewhere": other.sum(), "loud": 4 * weight.sum()}
    scales = GradientBalance(["constant", "elsewhere", "loud"], EVERY).train()(terms, [weight])
    assert {name: float(scale) for name, scale in scales.items()} == {"constant": 1.0, "elsewhere": 1.0, "loud": 0.25}


def test_what_was_known_of_a_term_outlasts_a_batch_of_which_it_says_nothing():
    weight = torch.nn.Parameter(torch.ones(3))
    balance = GradientBalance(["correlation"], 1).train()
    terms = ({"ce": weight.sum(), "correlation": size * weight.sum()} for size in (4.0, 4.0, 0.0, 4.0))
    found = [float(balance(each, [weight])["correlation"]) for each in terms]
    assert found == pytest.approx([1 / 4] * 4)


def test_a_term_that_begins_later_is_known_by_its_first_measurement():
    weight = torch.nn.Parameter(torch.ones(3))
    balance = GradientBalance(["late", "other"], 1).train()
    for _ in range(3):
        scales = balance({"ce": weight.sum(), "other": 2 * weight.sum()}, [weight])
    assert float(scales["other"]) == pytest.approx(1 / 2)
    scales = balance({"ce": weight.sum(), "other": 2 * weight.sum(), "late": 8 * weight.sum()}, [weight])
    assert float(scales["late"]) == pytest.approx(1 / 8)


def test_a_term_that_teaches_no_more_leaves_the_others_balanced():
    weight = torch.nn.Parameter(torch.ones(3))
    balance = GradientBalance(["early", "late"], EVERY).train()
    for _ in range(EVERY):
        balance({"ce": weight.sum(), "early": weight.sum() / 4, "late": weight.sum() / 2}, [weight])
    for _ in range(200 * EVERY):
        scales = balance({"ce": weight.sum(), "late": weight.sum() / 8}, [weight])
    assert float(scales["late"]) == pytest.approx(8, rel=1e-2)
    assert float(scales["early"]) == pytest.approx(4)


def test_fixed_weights_remain_possible(objective, batch):
    fixed, balanced = (objective(method="rsd", balance=how).train() for how in ("fixed", "gradient"))
    assert fixed.balance is None
    images = batch()
    losses = fixed(*images)
    assert float(losses.total.detach()) == pytest.approx(sum(float(term) for term in losses.terms.values()), rel=1e-5)
    assert float(balanced(*images).total.detach()) != pytest.approx(float(losses.total.detach()), rel=1e-3)


def test_the_balance_is_in_the_checkpoint_and_rests_in_eval(objective, batch):
    made = objective(method="fofa+rsd", balance="gradient").train()
    made(*batch())
    other = objective(method="fofa+rsd", balance="gradient")
    other.load_state_dict(made.state_dict())
    assert torch.equal(other.balance.norms, made.balance.norms)
    before = copy.deepcopy(made.balance.state_dict())
    made.eval()(*batch(seed=3))
    assert all(torch.equal(value, before[name]) for name, value in made.balance.state_dict().items())


def test_what_fp16_cannot_pass_back_is_measured_all_the_same():
    """Each of many numbers gets less than fp16's smallest; on a GPU the scaler of the loss sees to that, of the loss alone."""
    torch.manual_seed(0)
    layer, images = nn.Linear(16, 64), torch.randn(512, 16)

    def norm(dtype, size):
        with torch.autocast("cpu", dtype, enabled=dtype is not torch.float32):
            term = size * layer(images).float().square().mean()
        return float(_gradient_norm(term, list(layer.parameters())))

    for size in (1e-4, 1.0, 1e4):
        assert norm(torch.float16, size) == pytest.approx(norm(torch.float32, size), rel=0.05)


def test_a_gradient_that_is_too_large_for_the_scale_is_measured_without():
    weight = nn.Parameter(torch.ones(()))
    assert float(_gradient_norm(3e38 * weight, [weight])) == pytest.approx(3e38)
