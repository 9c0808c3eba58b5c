"""Prompts, region-aware attention, aligners and losses, each against its equation."""

import copy

import pytest
import torch
from scipy.special import rel_entr, softmax
from torch import nn
from torch.nn import functional

from fofa_deploy.distill.attention import Aligner, RegionAwareAttention, RegionEmbedding
from fofa_deploy.distill.depthwise import Depthwise5x5
from fofa_deploy.distill.grids import FEW, pool, resize
from fofa_deploy.distill.heads import SETTLED, ExitBranch, Projector, Standardizer
from fofa_deploy.distill.losses import divergence, hierarchical_context_loss, redundancy_loss
from fofa_deploy.distill.prompts import PromptBlock, SqueezeExcite

SHAPES = [(6, 8, 8), (10, 7, 5), (3, 1, 2)]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


# --- prompts


@pytest.mark.parametrize("channels", [16, 6, 7])
@pytest.mark.parametrize("gap_channels", [None, 5])
def test_a_new_prompt_is_exactly_the_identity(channels, gap_channels):
    block, grid, gap = PromptBlock(channels, gap_channels), torch.randn(3, channels, 6, 4), torch.randn(3, 5, 3, 3)
    assert torch.equal(block(grid, gap), grid)
    nn.init.constant_(block.b, 0.5)
    assert not torch.allclose(block(grid, gap), grid)


def test_squeeze_excite_returns_the_gated_map_and_not_the_gate():
    block, grid = SqueezeExcite(32), torch.randn(2, 32, 5, 5)
    gate = torch.sigmoid(block.excite(torch.relu(block.squeeze(grid.mean((2, 3), keepdim=True)))))
    assert torch.allclose(block(grid), grid * gate)
    assert block(grid).std(dim=(2, 3)).min() > 0.01  # no constant per channel
    assert block.squeeze.out_channels == 2


def test_prompts_are_no_constants_per_channel_and_see_the_gap():
    block, grid = PromptBlock(8, 4), torch.randn(2, 8, 6, 6)
    nn.init.ones_(block.b)
    prompt = block(grid, torch.randn(2, 4, 3, 3)) - grid
    assert prompt.std(dim=(2, 3)).min() > 1e-4
    assert not torch.allclose(prompt, block(grid, torch.randn(2, 4, 3, 3)) - grid)


def test_groups_divide_channels_and_the_prompt_convolution_is_depthwise():
    block = PromptBlock(10, 4)
    assert block.blocks[0].groups == 2
    assert block.blocks[1].groups == 10
    assert PromptBlock(7).blocks[0].groups == 1
    assert PromptBlock(8).blocks[0].groups == 4
    dense, light = (sum(p.numel() for p in PromptBlock(32, 32, fusion).parameters()) for fusion in ("dense", "depthwise"))
    assert dense - light == 32 * 32 * 25 - 32 * 25


def test_no_gradient_leaves_through_the_gap():
    block, gap = PromptBlock(8, 4), torch.randn(2, 4, 3, 3, requires_grad=True)
    nn.init.ones_(block.b)
    block(torch.randn(2, 8, 6, 6), gap).sum().backward()
    assert gap.grad is None
    assert all(p.grad is not None for p in block.parameters())


def test_prompts_keep_the_teachers_own_precision():
    assert PromptBlock(8)(torch.randn(2, 8, 4, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("size", [(8, 8), (5, 6), (3, 2), (1, 4), (4, 7)])
@pytest.mark.parametrize("channels", [16, 6])
def test_the_depthwise_convolution_is_the_ordinary_one(channels, size):
    block, grid = Depthwise5x5(channels), torch.randn(2, channels, *size)
    twin, weights = nn.Conv2d(channels, channels, 5, padding=2, groups=channels), torch.randn(2, channels, *size)
    twin.load_state_dict(block.state_dict())
    one, other = grid.clone().requires_grad_(), grid.clone().requires_grad_()
    assert torch.allclose(block(one), twin(other), atol=1e-6)
    (block(one) * weights).sum().backward()
    (twin(other) * weights).sum().backward()
    assert torch.allclose(one.grad, other.grad, atol=1e-5)
    for found, expected in zip(block.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(found.grad, expected.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gap_size", [(3, 2), (6, 4), (9, 8)])
@pytest.mark.parametrize("channels", [48, 16])
@pytest.mark.parametrize("fusion", ["dense", "depthwise"])
def test_prompts_are_the_equation(channels, gap_size, fusion):
    """As written, layer by layer; 24 cells are more than 16 channels and fewer than 48: both orders of products are tried."""
    block, grid, gap = PromptBlock(channels, 5, fusion).eval(), torch.randn(3, channels, 6, 4), torch.randn(3, 5, *gap_size)
    nn.init.constant_(block.b, 0.5)
    nn.init.normal_(block.fuse.norm.running_mean)
    feedback = block.fuse.project(block.fuse.norm(resize(gap, (6, 4))))
    expected = grid + block.b * block.blocks(block.fuse.blocks(torch.cat([grid, feedback], 1)))
    found = block(grid, gap)
    assert torch.allclose(found, expected, atol=1e-5)
    parameters, weights = list(block.parameters()), torch.randn_like(grid)
    for one, other in zip(*(torch.autograd.grad((out * weights).sum(), parameters) for out in (found, expected)), strict=True):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-4)


def test_resizing_is_smooth():
    grid = torch.linspace(0, 1, 7).expand(1, 1, 7, 7)
    wide = resize(grid, (8, 8))[0, 0, 0]
    assert (wide.diff() > 0).all()  # nearest would repeat a column
    assert resize(grid, (7, 7)) is grid


# --- region-aware attention


def attention(regions=4, cells=4, width=8, heads=2):
    return RegionAwareAttention(SHAPES, regions, cells, width, heads)


def maps(count=3, scale=1):
    return [torch.randn(count, c, h * scale, w * scale) for c, h, w in SHAPES]


@pytest.mark.parametrize("regions", [1, 4, 9, 16])
def test_shapes_at_any_square_number_of_regions_and_any_proportions(regions):
    split = attention(regions)(maps(5))
    assert [tuple(part.shape) for part in split] == [(5, regions, 8)] * 3


def test_other_image_sizes_pass():
    assert attention()(maps(2, scale=2))[0].shape == (2, 4, 8)


def test_reversing_the_batch_reverses_the_outputs_and_nothing_else():
    block, inputs = attention(), maps(4)
    forward, backward = block(inputs), block([grid.flip(0) for grid in inputs])
    assert all(torch.allclose(a.flip(0), b, atol=1e-6) for a, b in zip(forward, backward, strict=True))


def test_samples_do_not_mix():
    block, inputs = attention(), maps(3)
    changed = [grid.clone() for grid in inputs]
    for grid in changed:
        grid[1] += 1
    before, after = block(inputs), block(changed)
    for a, b in zip(before, after, strict=True):
        assert torch.allclose(a[[0, 2]], b[[0, 2]], atol=1e-6)
        assert not torch.allclose(a[1], b[1])


def test_positions_order_the_regions_and_not_the_batch():
    block = attention()
    assert tuple(block.positions.shape) == (1, 3 * 4, 8)
    inputs = maps(2)
    twins = [grid[:1].expand(2, -1, -1, -1) for grid in inputs]
    assert all(torch.allclose(part[0], part[1]) for part in block(twins))
    before = block(inputs)[0]
    nn.init.normal_(block.positions)
    assert not torch.allclose(before, block(inputs)[0])


def test_every_stage_sees_every_stage():
    block, inputs = attention(), maps(1)
    for grid in inputs:
        grid.requires_grad_()
    block(inputs)[0].square().sum().backward()
    assert all(grid.grad.abs().sum() > 0 for grid in inputs)


def test_attention_is_the_equation():
    block, inputs = attention(), maps(2)
    tokens = block.norm(torch.cat([e(g) for e, g in zip(block.embeddings, inputs, strict=True)], 1))
    q, k, v = block.query(tokens + block.positions), block.key(tokens + block.positions), block.value(tokens)
    heads = [torch.softmax(q[..., s] @ k[..., s].mT / 4**0.5, -1) @ v[..., s] for s in (slice(0, 4), slice(4, 8))]
    assert torch.allclose(torch.cat(heads, -1), torch.cat(block(inputs), 1), atol=1e-6)


def test_regions_are_row_major():
    block = attention().embeddings[0]
    grid = torch.zeros(1, 6, 8, 8)
    grid[..., :4, 4:] = 1  # upper right
    tokens = block(grid) - block(torch.zeros_like(grid))
    assert tokens.abs().sum(2).nonzero()[:, 1].tolist() == [1]


def test_weights_of_an_embedding_do_not_grow_with_the_map():
    small, large = (RegionEmbedding(3, size, side=4, cells=4, width=8) for size in ((16, 13), (112, 112)))
    assert small.kernel == large.kernel == (4, 4)
    assert RegionEmbedding(3, (7, 30), side=4, cells=4, width=8).kernel == (2, 4)


def test_a_finer_map_is_averaged_and_stays_where_it_is():
    fine, coarse = (RegionEmbedding(1, (side, side), side=2, cells=2, width=4) for side in (24, 4))
    coarse.load_state_dict(fine.state_dict())
    assert torch.allclose(fine(torch.full((1, 1, 24, 24), 0.7)), coarse(torch.full((1, 1, 4, 4), 0.7)), atol=1e-5)
    lit = torch.zeros(1, 1, 24, 24)
    lit[..., 1:5, 19:23] = 1  # in the upper right cell of the upper right region
    changed = fine(lit) - fine(torch.zeros_like(lit))
    assert changed.abs().sum(2).nonzero()[:, 1].tolist() == [1]


@pytest.mark.parametrize("size", [(1, 1), (1, 2), (2, 2), (8, 5), (14, 14)])
def test_aligners_commute_with_resizing(size):
    aligner, tokens = Aligner(8, 6), torch.randn(3, 4, 8)
    grid = tokens.transpose(1, 2).reshape(3, 8, 2, 2)
    assert torch.allclose(resize(aligner(tokens, size), size), aligner.project(resize(grid, size)), atol=1e-6)


# --- grids


@pytest.mark.parametrize("before", [(4, 4), (2, 3), (8, 8), (8, 9)])
@pytest.mark.parametrize("size", [(4, 4), (8, 9), (9, 9), (16, 16), (7, 5), (1, 1)])
def test_resizing_is_interpolation(before, size):
    one, other = (torch.randn(2, 3, *before, generator=torch.Generator().manual_seed(0)).requires_grad_() for _ in range(2))
    shrinks = size[0] < before[0] or size[1] < before[1]
    expected = functional.interpolate(other, size=size, mode="bilinear", align_corners=False, antialias=shrinks)
    assert torch.allclose(resize(one, size), expected, atol=1e-6)
    resize(one, size).square().sum().backward()
    expected.square().sum().backward()
    assert torch.allclose(one.grad, other.grad, atol=1e-5)
    assert (before == (8, 9)) == (before[0] * before[1] > FEW), "both ways are tried"


@pytest.mark.parametrize("size", [(16, 16), (7, 7), (5, 9)])
def test_pooling_is_adaptive_average_pooling(size):
    grid = torch.randn(2, 3, *size)
    expected = torch.cat([functional.adaptive_avg_pool2d(grid, side).flatten(2) for side in (4, 2, 1)], dim=2)
    assert torch.allclose(pool(grid, (4, 2, 1)), expected, atol=1e-6)


# --- losses


def test_hierarchical_context_loss_by_hand():
    a, b = torch.zeros(1, 1, 2, 2), torch.tensor([[[[1.0, 2.0], [3.0, 6.0]]]])
    # MSE = (1 + 4 + 9 + 36) / 4; pool 1: mean 3; pools 4 and 2 do not make it smaller.
    assert hierarchical_context_loss(a, b) == pytest.approx((12.5 + 9 / 8) / (1 + 1 / 8))
    assert hierarchical_context_loss(b[..., :1, :1], a[..., :1, :1]) == pytest.approx(1.0)


def test_hierarchical_context_loss_pools_each_map():
    a, b = torch.randn(2, 3, 8, 6), torch.randn(2, 3, 8, 6)
    expected = functional.mse_loss(a, b)
    for size, weight in ((4, 0.5), (2, 0.25), (1, 0.125)):
        expected += weight * functional.mse_loss(functional.adaptive_avg_pool2d(a, size), functional.adaptive_avg_pool2d(b, size))
    assert torch.allclose(hierarchical_context_loss(a, b), expected / 1.875)


@pytest.mark.parametrize("size", [(1, 1), (2, 5), (4, 4), (4, 7), (16, 9)])
def test_a_smaller_map_is_compared_as_if_it_had_been_enlarged(size):
    small, large = (torch.randn(3, 5, *shape, requires_grad=True) for shape in ((4, 4), size))
    losses = hierarchical_context_loss(small, large), hierarchical_context_loss(resize(small, size), large)
    assert torch.allclose(*losses, rtol=1e-5)
    for one, other in zip(*(torch.autograd.grad(loss, (small, large)) for loss in losses), strict=True):
        assert torch.allclose(one, other, atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_divergence_matches_scipy_and_runs_from_teacher_to_student(temperature):
    teacher, student = torch.randn(5, 7), torch.randn(5, 7)
    p, q = (softmax(logits.numpy() / temperature, axis=1) for logits in (teacher, student))
    expected = rel_entr(p, q).sum(1).mean() * temperature**2
    assert float(divergence(teacher, student, temperature)) == pytest.approx(expected, rel=1e-4)
    assert float(divergence(teacher, teacher)) == pytest.approx(0, abs=1e-6)


def whitened(count=64, width=6):
    centred = torch.randn(count, width, dtype=torch.float64)
    centred -= centred.mean(0)
    return (torch.linalg.qr(centred)[0] * count**0.5).float()


def test_rsd_is_zero_at_identity_correlation_and_by_hand_elsewhere():
    z = whitened()
    assert float(redundancy_loss(z, 3 * z + 2, 0.05)) == pytest.approx(0, abs=1e-6)
    assert float(redundancy_loss(-z, z, 0.05)) == pytest.approx(4, rel=1e-4)
    assert float(redundancy_loss(z.roll(1, dims=1), z, 0.5)) == pytest.approx(1 + 0.5, rel=1e-4)


def test_rsd_of_a_constant_batch_is_finite():
    z = torch.ones(4, 3, requires_grad=True)
    redundancy_loss(z, torch.randn(4, 3), 0.05).backward()
    assert z.grad.isfinite().all()


def test_losses_are_float32_under_autocast():
    a, b = torch.randn(8, 4, 4, 4), torch.randn(8, 4, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        low = [
            hierarchical_context_loss(a, b),
            divergence(a[:, :, 0, 0], b[:, :, 0, 0]),
            redundancy_loss(a[:, :, 0, 0], b[:, :, 0, 0], 0.1),
        ]
    high = [
        hierarchical_context_loss(a, b),
        divergence(a[:, :, 0, 0], b[:, :, 0, 0]),
        redundancy_loss(a[:, :, 0, 0], b[:, :, 0, 0], 0.1),
    ]
    assert all(one.dtype == torch.float32 and torch.equal(one, other) for one, other in zip(low, high, strict=True))


def test_the_projector_is_a_two_layer_mlp_with_batchnorm_between():
    assert [type(layer) for layer in Projector(3, 5)] == [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear]


# --- statistics


def test_statistics_are_those_of_all_batches_pooled():
    scale, data = Standardizer(3), 5 * torch.randn(40, 3, 2, 2) + torch.tensor([1.0, 100.0, -7.0])[:, None, None]
    for part in data.split(8):
        scale.update(part)
    variance, mean = torch.var_mean(data, dim=(0, 2, 3), correction=0)
    assert torch.allclose(scale.mean, mean, rtol=1e-4, atol=1e-4)
    assert torch.allclose(scale.variance, variance, rtol=1e-3)
    standardized = scale(data)
    assert standardized.mean().abs() < 1e-3
    assert standardized.std().item() == pytest.approx(1, abs=0.01)


def test_statistics_settle():
    scale = Standardizer(3)
    for _ in range(SETTLED):
        scale.update(torch.randn(4, 3, 2, 2))
    settled = copy.deepcopy(scale.state_dict())
    scale.update(100 + torch.randn(4, 3, 2, 2))
    assert all(torch.equal(value, settled[key]) for key, value in scale.state_dict().items())


def test_standardizing_neither_learns_nor_updates_by_itself():
    scale = Standardizer(3)
    before = copy.deepcopy(scale.state_dict())
    scale.train()(torch.randn(4, 3, 2, 2))
    assert all(torch.equal(value, before[key]) for key, value in scale.state_dict().items())
    assert list(scale.state_dict()) == ["mean", "variance", "batches"]
    assert not list(scale.parameters())


@pytest.mark.parametrize("factor", [1e-3, 1.0, 1e3])
def test_scale_and_dead_channels_do_not_matter(factor):
    scale, data = Standardizer(3), torch.randn(16, 3, 4, 4) * factor
    data[:, 1] = 0
    scale.update(data)
    out = scale(data)
    assert out[:, [0, 2]].std().item() == pytest.approx(1, abs=0.05)
    assert out[:, 1].abs().max() < 1e-3


@pytest.mark.parametrize(
    ("side", "halvings"), [(1, 0), (4, 0), (5, 1), (7, 1), (8, 1), (14, 2), (16, 2), (28, 3), (56, 4), (64, 4)]
)
def test_an_exit_halves_its_grid_until_it_is_four_by_four(side, halvings):
    branch = ExitBranch((6, side, side), 5)
    seen = []
    branch[-4].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[-1]))
    assert branch(torch.randn(2, 6, side, side)).shape == (2, 5)
    assert isinstance(branch[-4], nn.AdaptiveAvgPool2d)
    assert seen[0] <= 4
    assert len([layer for layer in branch if isinstance(layer, nn.BatchNorm2d)]) == halvings
