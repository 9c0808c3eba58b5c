"""The loss of every method as a function of tensors, all in float32 whatever autocast says."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from fofa_deploy.distill.grids import enlarging, pool, pooling, resize

_POOLS = {4: 1 / 2, 2: 1 / 4, 1: 1 / 8}


def hierarchical_context_loss(student: Tensor, teacher: Tensor, emphasis: Tensor | None = None) -> Tensor:
    """HCL: [MSE + 1/2 MSE(pool4) + 1/4 MSE(pool2) + 1/8 MSE(pool1)] / weights used. arXiv 2501.08885, equation 5.

    (B, C, h, w), which is enlarged, and (B, C, H, W) -> scalar. A pooling is used where it makes both sides smaller.
    ``emphasis``, broadcast over (B, C, H, W), weighs squared errors.
    """
    student, teacher = student.float(), teacher.float()
    size = (teacher.shape[-2], teacher.shape[-1])
    sides = [side for side in _POOLS if side < min(size)]
    matrix = enlarging(student, size) if emphasis is None and student.shape[-2:] != teacher.shape[-2:] else None
    with torch.autocast(teacher.device.type, enabled=False):
        if matrix is not None:
            loss, pooled = _enlarged_error(student, teacher, matrix, pooling(teacher, sides) if sides else None)
        else:
            gap = resize(student, size) - teacher
            if emphasis is not None:
                gap = gap * emphasis.sqrt()
            # Pooling is linear, so the difference is pooled once instead of either map.
            loss, pooled = gap.square().mean(), pool(gap, sides) if sides else None
    if pooled is None:
        return loss
    squares = pooled.square().mean(dim=(0, 1))
    # Each cell's part in the mean over its pooling.
    weights = torch.cat([squares.new_full((side * side,), _POOLS[side] / side**2) for side in sides])
    return (loss + (squares * weights).sum()) / (1 + sum(_POOLS[side] for side in sides))


def _enlarged_error(student: Tensor, teacher: Tensor, matrix: Tensor, pools: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """MSE of the student's grid times ``matrix``, and the pooled difference, without a map of the teacher's size but its own.

    With S and T flat, |S M - T|^2 = S M M' S' - 2 S M T' + |T|^2, and all that is left of T is small.
    """
    few, many = student.flatten(2), teacher.flatten(2)
    seen = many @ (matrix.mT if pools is None else torch.cat([matrix.mT, pools], dim=1))
    cells = few.shape[2]
    square = (few * (few @ (matrix @ matrix.mT) - 2 * seen[..., :cells])).sum() + torch.linalg.vector_norm(many).square()
    return square / many.numel(), None if pools is None else few @ (matrix @ pools) - seen[..., cells:]


def divergence(teacher: Tensor, student: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 KL(teacher || student), nats per sample, of logits (B, K). Hinton et al., arXiv 1503.02531; 2501.08885, equation 6."""
    target = functional.log_softmax(teacher.float() / temperature, dim=1)
    guess = functional.log_softmax(student.float() / temperature, dim=1)
    return functional.kl_div(guess, target, reduction="batchmean", log_target=True) * temperature**2


def decoupled_divergence(teacher: Tensor, student: Tensor, labels: Tensor, temperature: float, beta: float) -> Tensor:
    """DKD: T^2 [KL of (target, rest) + beta KL among the rest], of logits (B, K), labels (B,). arXiv 2203.08679, equation 7."""
    target = functional.one_hot(labels, teacher.shape[1]).bool()
    logs = [functional.log_softmax(logits.float() / temperature, dim=1) for logits in (teacher, student)]
    binary = [torch.stack([log[target], _log_rest(log, target)], dim=1) for log in logs]
    # A logit this low leaves the softmax without making it infinite.
    rest = [functional.log_softmax(logits.float().masked_fill(target, -1e4) / temperature, dim=1) for logits in (teacher, student)]
    return temperature**2 * (_log_divergence(*binary) + beta * _log_divergence(*rest))


def _log_rest(log: Tensor, target: Tensor) -> Tensor:
    """log(1 - p_target) of log-probabilities (B, K), without the cancellation of 1 - p: (B,)."""
    return log.masked_fill(target, -torch.inf).logsumexp(dim=1)


def _log_divergence(teacher: Tensor, student: Tensor) -> Tensor:
    return functional.kl_div(student, teacher, reduction="batchmean", log_target=True)


def relational_divergence(teacher: Tensor, student: Tensor, temperature: float = 1.0) -> Tensor:
    """DIST: 1 - Pearson correlation of predictions, over classes per sample plus over samples per class. arXiv 2205.10536.

    Logits (B, K) -> scalar, times T^2. One sample has no correlation between samples: that part is then left out.
    """
    guess, target = (torch.softmax(logits.float() / temperature, dim=1) for logits in (student, teacher))
    loss = 1 - _correlation(guess, target).mean()
    if len(guess) > 1:
        loss = loss + 1 - _correlation(guess.T, target.T).mean()
    return temperature**2 * loss


def _correlation(one: Tensor, other: Tensor) -> Tensor:
    """Pearson correlation of rows: both (N, M) -> (N,)."""
    return functional.cosine_similarity(one - one.mean(dim=1, keepdim=True), other - other.mean(dim=1, keepdim=True), dim=1)


def one_for_all_loss(teacher: Tensor, student: Tensor, labels: Tensor, gamma: float) -> Tensor:
    """OFA: -[(1 + p_t[y])^gamma - 1] log p_s[y] - sum over c != y of p_t[c] log p_s[c]. Logits (B, K), labels (B,) -> scalar.

    That is equation 6 of arXiv 2310.19444 without the labels' cross-entropy -log p_s[y], which it contains and which is a loss of
    its own here: the student's answer would be held to the labels twice, and exits need no labels.
    """
    log, target = functional.log_softmax(student.float(), dim=1), torch.softmax(teacher.float(), dim=1)
    enhanced = (1 + target.gather(1, labels[:, None])) ** gamma - 1
    return -(log * target.scatter(1, labels[:, None], enhanced)).sum(dim=1).mean()


def _standardize(embedding: Tensor) -> Tensor:
    """(B, D) -> (B, D) with mean 0 and variance 1 over the batch."""
    centred = embedding - embedding.mean(dim=0)
    return centred * torch.rsqrt(centred.square().mean(dim=0) + 1e-6)


def redundancy_loss(student: Tensor, teacher: Tensor, off_diagonal: float) -> Tensor:
    """RSD of projected student and teacher embeddings, both (B, d). arXiv 2507.21844.

    C = Z_s^T Z_t / B;  L = (1/d) [sum_i (1 - C_ii)^2 + lambda sum_{i != j} C_ij^2]; the published code is without 1/d.
    """
    with torch.autocast(student.device.type, enabled=False):
        correlation = _standardize(student.float()).T @ _standardize(teacher.float()) / len(student)
        diagonal = correlation.diagonal()
        others = correlation.square().sum() - diagonal.square().sum()
        return ((1 - diagonal).square().sum() + off_diagonal * others) / len(diagonal)
