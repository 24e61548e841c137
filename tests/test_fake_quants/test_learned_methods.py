"""Each learned fake quantizer by the formulas of its paper."""

from __future__ import annotations

import math

import pytest
import torch
from small_models import calibrate, images, quantized
from torch import nn

from mmrazor_quant.fake_quants import (
    DSQFakeQuantize,
    LSQFakeQuantize,
    LSQPlusFakeQuantize,
    PACTFakeQuantize,
    TQTFakeQuantize,
)
from mmrazor_quant.observers import MinMaxObserver
from mmrazor_quant.qscheme import QScheme


def build(kind, scheme, x=None, **kwargs):
    """A fake quantizer that has its start values from ``x``."""
    quantizer = kind(observer=MinMaxObserver, **scheme.observer_params(), **kwargs)
    if x is not None:
        quantizer(x)
    return quantizer


# -- LSQ: Esser et al. 2020 --------------------------------------------------------------------------------------------


@pytest.mark.parametrize('scheme', [QScheme(bit=4), QScheme(bit=3, is_signed=False), QScheme(bit=4, is_symmetry=False)])
def test_lsq_gradient_is_eq_3_and_5(scheme):
    x = torch.randn(500)
    x = x.abs() if scheme.is_symmetry and not scheme.signed else x
    quantizer = build(LSQFakeQuantize, scheme, 0.5 * x, scale_grad=False)
    s, z = quantizer.scale.item(), quantizer.zero_point.item()
    weight = torch.randn(500)
    quantizer.zero_grad()
    (quantizer(x) * weight).sum().backward()
    v = x.double() / s
    low, high = scheme.quant_min - z, scheme.quant_max - z
    terms = torch.where(v < low, float(low), torch.where(v > high, float(high), v.round() - v))
    # Between the end of the range and half a step beyond, eq. 3 clips and the code rounds: the same but for -v + end.
    near = ((v > high) & (v < high + 0.5)) | ((v < low) & (v > low - 0.5))
    terms = torch.where(near, v.round() - v, terms)
    assert quantizer.scale.grad.item() == pytest.approx((terms * weight).sum().item(), rel=1e-4, abs=1e-3)


@pytest.mark.parametrize('batch', [1, 5])
@pytest.mark.parametrize('per_channel', [False, True])
def test_lsq_factor_counts_the_features_of_a_sample(per_channel, batch):
    """g = 1 / sqrt(N Qp), section 2.2: N features for activations, whatever the batch size, and N weights."""
    config = dict(
        w_fake_quant=dict(type='mmrazor.LSQFakeQuantize'), a_fake_quant=dict(type='mmrazor.LSQFakeQuantize'),
        w_qscheme=dict(bit=4, is_per_channel=per_channel),
        a_qscheme=dict(bit=4, is_symmetry=False, is_per_channel=per_channel),
    )  # fmt: skip
    model = quantized(nn.Sequential(nn.Conv2d(3, 5, 3), nn.Flatten(), nn.Linear(180, 7)), config)
    x = images(batch)
    conv, linear = model.architecture[0], model.architecture[2]
    assert conv.weight_fake_quant.batch_axis is None and conv.input_fake_quant.batch_axis == 0

    def factor(quantizer, tensor):
        return quantizer.grad_factor(tensor)

    features, hidden = 3 * 8 * 8, 180
    weights, hidden_weights = 5 * 3 * 9, 7 * 180
    n = [features // 3, weights // 5, 1, hidden_weights // 7] if per_channel else [
        features, weights, hidden, hidden_weights]  # fmt: skip
    found = [
        factor(conv.input_fake_quant, x), factor(conv.weight_fake_quant, conv.weight),
        factor(linear.input_fake_quant, torch.zeros(batch, 180)), factor(linear.weight_fake_quant, linear.weight),
    ]  # fmt: skip
    assert found == pytest.approx([1 / math.sqrt(count * highest) for count, highest in zip(n, (15, 7, 15, 7))])


def test_lsq_factor_multiplies_the_gradient():
    x = torch.randn(4, 50)
    with_factor, without = (build(LSQFakeQuantize, QScheme(bit=4), x, scale_grad=flag) for flag in (True, False))
    for quantizer in (with_factor, without):
        quantizer.batch_axis = 0
        quantizer.zero_grad()
        quantizer(2 * x).sum().backward()
    torch.testing.assert_close(with_factor.scale.grad, without.scale.grad / math.sqrt(50 * 7))


@pytest.mark.parametrize('scheme, highest', [(QScheme(bit=1), 1), (QScheme(bit=1, is_signed=False), 1)])
def test_lsq_factor_of_one_bit(scheme, highest):
    """The only levels are -s and 0, and there is no Qp."""
    quantizer = build(LSQFakeQuantize, scheme)
    assert quantizer.grad_factor(torch.zeros(16)) == pytest.approx(1 / math.sqrt(16 * highest))


# -- LSQ+: Bhalgat et al. 2020 -----------------------------------------------------------------------------------------


@pytest.mark.parametrize('low, high', [(1.0, 3.0), (-3.0, -1.0), (-1.0, 3.0), (0.0, 2.0), (5.0, 5.1)])
@pytest.mark.parametrize('signed', [False, True])
def test_lsq_plus_represents_ranges_without_zero(low, high, signed):
    """The offset is free; the step is that of the range itself."""
    x = torch.linspace(low, high, 200)
    quantizer = build(LSQPlusFakeQuantize, QScheme(bit=4, is_symmetry=False, is_signed=signed), x)
    y = quantizer(x).detach()
    assert (y - x).abs().max() <= (high - low) / 15 * 0.5001 + 1e-6
    assert len(y.unique()) <= 16
    wanted = torch.tensor([low, high])
    if low > 0 or high < 0:
        torch.testing.assert_close(y[[0, -1]], wanted)


def test_lsq_plus_in_symmetric_schemes_is_lsq():
    x = torch.randn(100)
    plus, plain = (build(kind, QScheme(bit=4), x) for kind in (LSQPlusFakeQuantize, LSQFakeQuantize))
    assert plus.offset is None and len(plus.learned_parameters()) == 1
    assert torch.equal(plus(x), plain(x))


def test_lsq_plus_per_channel_starts_each_channel_by_itself():
    x = torch.rand(50, 3) + torch.tensor([-0.5, 2.0, -4.0])
    quantizer = build(LSQPlusFakeQuantize, QScheme(bit=4, is_symmetry=False, is_per_channel=True, ch_axis=1), x)
    assert quantizer.offset.shape == (3,)
    assert ((quantizer(x) - x).abs().amax(0) <= 0.5001 * (x.amax(0) - x.amin(0)) / 15 + 1e-6).all()


def test_lsq_plus_gradients_are_eq_5_and_6():
    x = torch.randn(500) + 1
    quantizer = build(LSQPlusFakeQuantize, QScheme(bit=3, is_symmetry=False), 0.5 * x, scale_grad=False)
    s, b = quantizer.scale.item(), quantizer.offset.item()
    weight = torch.randn(500)
    quantizer.zero_grad()
    (quantizer(x) * weight).sum().backward()
    v = (x.double() - b) / s
    outside = (v.round() < 0) | (v.round() > 7)
    of_scale = torch.where(outside, v.clamp(0, 7).round(), v.round() - v)
    assert quantizer.scale.grad.item() == pytest.approx((of_scale * weight).sum().item(), rel=1e-4, abs=1e-3)
    assert quantizer.offset.grad.item() == pytest.approx((outside * weight).sum().item(), rel=1e-4, abs=1e-3)


def test_lsq_plus_offset_is_not_rounded_to_the_grid():
    x = torch.rand(200)
    quantizer = build(LSQPlusFakeQuantize, QScheme(bit=2, is_symmetry=False), x)
    with torch.no_grad():
        quantizer.offset.add_(0.1 * quantizer.scale)
    y = quantizer(x)
    steps = (y / quantizer.scale).detach()
    torch.testing.assert_close((steps - 0.1 - steps.floor()).abs() % 1, torch.zeros(200), atol=0.15, rtol=0)
    assert (steps - steps.round()).abs().max() > 0.05


# -- PACT: Choi et al. 2018 --------------------------------------------------------------------------------------------


def test_pact_of_the_paper():
    """The range [0, alpha]; the gradient of alpha is the sum over what is clipped (eq. 3)."""
    x = torch.rand(300) * 2
    quantizer = build(PACTFakeQuantize, QScheme(bit=4, is_signed=False), x.clamp(max=1.0))
    assert quantizer.lower is None and quantizer.upper.item() == pytest.approx(1.0)
    weight = torch.randn(300)
    x.requires_grad_()
    y = quantizer(x)
    torch.testing.assert_close(y, torch.round(x.clamp(max=1.0) * 15) / 15)
    (y * weight).sum().backward()
    above = x > 1 + 0.5 / 15
    assert quantizer.upper.grad.item() == pytest.approx(weight[above].sum().item(), rel=1e-5)
    assert torch.equal(x.grad, torch.where(above, 0.0, weight))


def test_pact_learns_both_ends_of_asymmetric_ranges():
    x = torch.randn(300)
    quantizer = build(PACTFakeQuantize, QScheme(bit=4, is_symmetry=False), x / 2)
    weight = torch.randn(300)
    (quantizer(x) * weight).sum().backward()
    s, z = quantizer.scale, quantizer.zero_point
    q = torch.round(x / s) + z
    assert quantizer.lower.grad.item() == pytest.approx(weight[q < 0].sum().item(), rel=1e-5)
    assert quantizer.upper.grad.item() == pytest.approx(weight[q > 15].sum().item(), rel=1e-5)


def test_pact_of_symmetric_signed_ranges_moves_both_ends_with_one_parameter():
    x = torch.randn(300)
    quantizer = build(PACTFakeQuantize, QScheme(bit=4), x / 2)
    weight = torch.randn(300)
    (quantizer(x) * weight).sum().backward()
    q = torch.round(x / quantizer.scale)
    expected = weight[q > 7].sum() - weight[q < -8].sum()
    assert quantizer.upper.grad.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize('scheme', [
    QScheme(bit=4, is_signed=False), QScheme(bit=4), QScheme(bit=4, is_symmetry=False), QScheme(bit=1)])  # fmt: skip
@pytest.mark.parametrize('kind', [PACTFakeQuantize, DSQFakeQuantize])
def test_grid_follows_the_range(kind, scheme):
    x = torch.rand(100) if not scheme.signed and scheme.is_symmetry else torch.randn(100)
    quantizer = build(kind, scheme, x)
    before = quantizer.scale.clone()
    with torch.no_grad():
        for end in filter(lambda e: e is not None, (quantizer.lower, quantizer.upper)):
            end.mul_(2)
    y = quantizer(x)
    torch.testing.assert_close(quantizer.scale, 2 * before)
    steps = (y / quantizer.scale).detach()
    torch.testing.assert_close(steps, steps.round(), atol=1e-4, rtol=0)


@pytest.mark.parametrize('kind', [PACTFakeQuantize, DSQFakeQuantize])
def test_a_range_that_an_optimizer_made_negative_stays_usable(kind):
    quantizer = build(kind, QScheme(bit=4, is_signed=False), torch.rand(100))
    with torch.no_grad():
        quantizer.upper.fill_(-0.5)
    y = quantizer(torch.rand(100))
    assert torch.isfinite(y).all() and quantizer.scale > 0
    y.sum().backward()
    assert torch.isfinite(quantizer.upper.grad).all()


def test_pact_upper_end_is_learned_from_clipped_values():
    """The end of a range that is too narrow grows; weight decay pulls one in that is too wide."""
    x = torch.rand(500) * 4
    quantizer = build(PACTFakeQuantize, QScheme(bit=4, is_signed=False), x / 4)
    optimizer = torch.optim.SGD(quantizer.parameters(), 1.0)
    for _ in range(100):
        optimizer.zero_grad()
        (quantizer(x) - x).pow(2).mean().backward()
        optimizer.step()
    assert 3 < quantizer.upper.item() < 4.2
    assert PACTFakeQuantize.regularized and not DSQFakeQuantize.regularized


# -- DSQ: Gong et al. 2019 ---------------------------------------------------------------------------------------------


def test_dsq_forward_is_the_hard_staircase_and_its_gradient_the_soft_one():
    x = torch.randn(300)
    quantizer = build(DSQFakeQuantize, QScheme(bit=3, is_symmetry=False), x, alpha=0.3)
    x.requires_grad_()
    y = quantizer(x)
    s, z = quantizer.scale.double(), quantizer.zero_point
    torch.testing.assert_close(y, ((torch.round(x / quantizer.scale) + z).clamp(0, 7) - z) * quantizer.scale)
    y.sum().backward()
    # eq. 3, 5 and 7: s_ tanh(k (x - m)), with s_ = 1 / (1 - alpha) and k = ln(2 / alpha - 1) / delta.
    k = math.log(2 / 0.3 - 1) / s
    middle = (torch.floor(x.double() / s) + 0.5) * s
    slope = s / 2 / (1 - 0.3) * k / torch.cosh(k * (x.double() - middle)) ** 2
    q = torch.round(x / quantizer.scale) + z
    inside = (q >= 0) & (q <= 7)
    torch.testing.assert_close(x.grad.double(), torch.where(inside, slope, 0.0), rtol=1e-4, atol=1e-4)


def test_dsq_gradient_of_the_soft_staircase_averages_to_that_of_the_identity():
    x = torch.linspace(-1, 1, 10001).requires_grad_()
    quantizer = build(DSQFakeQuantize, QScheme(bit=4, is_symmetry=False), x.detach())
    quantizer(x).sum().backward()
    assert x.grad.mean().item() == pytest.approx(1.0, abs=0.02)
    assert x.grad.max() > 1.2 and x.grad.min() < 0.6


def test_dsq_range_and_sharpness_are_learned():
    x = torch.randn(300)
    quantizer = build(DSQFakeQuantize, QScheme(bit=3, is_symmetry=False), x / 2)
    weight = torch.randn(300)
    (quantizer(x) * weight).sum().backward()
    q = torch.round(x / quantizer.scale) + quantizer.zero_point
    assert quantizer.lower.grad.item() == pytest.approx(weight[q < 0].sum().item(), rel=1e-5)
    assert quantizer.upper.grad.item() == pytest.approx(weight[q > 7].sum().item(), rel=1e-5)

    def soft(alpha):
        s = quantizer.scale.double()
        r = x.double() / s - torch.floor(x.double() / s) - 0.5
        y = s * torch.tanh(math.log(2 / alpha - 1) * r) / (2 * (1 - alpha))
        return (y * weight)[(q >= 0) & (q <= 7)].sum().item()

    step = 1e-6
    slope = (soft(0.2 + step) - soft(0.2 - step)) / (2 * step)
    assert quantizer.alpha.grad.item() == pytest.approx(slope, rel=1e-3)


@pytest.mark.parametrize('alpha', [-1.0, 0.0, 1.0, 5.0])
def test_dsq_sharpness_out_of_bounds_is_used_as_the_bound(alpha):
    x = torch.randn(50)
    quantizer = build(DSQFakeQuantize, QScheme(bit=3, is_symmetry=False), x)
    with torch.no_grad():
        quantizer.alpha.fill_(alpha)
    x.requires_grad_()
    quantizer(x).sum().backward()
    assert torch.isfinite(x.grad).all() and torch.isfinite(quantizer.alpha.grad).all()


# -- TQT: Jain et al. 2020 ---------------------------------------------------------------------------------------------

TQT_SCHEMES = [
    (QScheme(bit=8, is_pot_scale=True), 7), (QScheme(bit=8, is_pot_scale=True, is_signed=False), 8),
    (QScheme(bit=4), 3), (QScheme(bit=4, is_signed=False), 4), (QScheme(bit=4, is_symmetric_range=True), 3),
    (QScheme(bit=2, is_pot_scale=True), 1), (QScheme(bit=2, is_symmetric_range=True), 1), (QScheme(bit=1), 0),
]  # fmt: skip


@pytest.mark.parametrize('scheme, log2_levels', TQT_SCHEMES)
@pytest.mark.parametrize('threshold', [0.3, 1.0, 2.7])
def test_tqt_scale_is_eq_3(scheme, log2_levels, threshold):
    quantizer = build(TQTFakeQuantize, scheme, torch.rand(10))
    with torch.no_grad():
        quantizer.log2_threshold.fill_(math.log2(threshold))
    quantizer(torch.rand(10))
    log2 = math.ceil(math.log2(threshold)) if scheme.is_pot_scale else math.log2(threshold)
    assert quantizer.scale.item() == pytest.approx(2.0 ** (log2 - log2_levels), rel=1e-6)
    if scheme.is_pot_scale:
        assert quantizer.scale.item() == 2.0 ** (log2 - log2_levels)


@pytest.mark.parametrize('scheme', [scheme for scheme, _ in TQT_SCHEMES])
def test_tqt_gradient_is_eq_6_and_8(scheme):
    """s ln 2 times: round(x / s) - x / s inside, n below, p above."""
    x = torch.randn(500)
    x = x if scheme.signed else x.abs()
    quantizer = build(TQTFakeQuantize, scheme, x / 3)
    quantizer.zero_grad()
    weight = torch.randn(500)
    x.requires_grad_()
    (quantizer(x) * weight).sum().backward()
    s = quantizer.scale.double()
    v = x.detach().double() / s
    below, above = v.round() < scheme.quant_min, v.round() > scheme.quant_max
    terms = torch.where(below, float(scheme.quant_min), torch.where(above, float(scheme.quant_max), v.round() - v))
    expected = (s * math.log(2) * terms * weight).sum().item()
    assert quantizer.log2_threshold.grad.item() == pytest.approx(expected, rel=1e-4, abs=1e-4)
    assert torch.equal(x.grad, torch.where(below | above, 0.0, weight))


def test_tqt_power_of_two_scale_is_not_on_the_edge_of_its_interval():
    """A small step of the threshold, either way, leaves a calibrated scale as it is."""
    for value in (0.26, 0.5, 1.0, 1.9):
        quantizer = build(TQTFakeQuantize, QScheme(bit=8, is_pot_scale=True), torch.tensor([-value, value]))
        before = quantizer.scale.clone()
        for step in (0.4, -0.8):
            with torch.no_grad():
                quantizer.log2_threshold.add_(step)
            quantizer.settle()
            assert torch.equal(quantizer.scale, before)


def test_tqt_per_channel_in_a_model():
    config = dict(
        w_fake_quant=dict(type='mmrazor.TQTFakeQuantize'), w_qscheme=dict(bit=4, is_per_channel=True, is_pot_scale=True)
    )
    model = calibrate(quantized(nn.Sequential(nn.Conv2d(3, 5, 3)), config))
    quantizer = model.architecture[0].weight_fake_quant
    assert quantizer.log2_threshold.shape == (5,)
    assert torch.equal(torch.frexp(quantizer.scale).mantissa, torch.full((5,), 0.5))
    model(images()).sum().backward()
    assert quantizer.log2_threshold.grad.shape == (5,)
