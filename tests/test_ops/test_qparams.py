"""Scale and zero point from ranges."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch.ao.quantization import MinMaxObserver

from mmrazor_quant import ops
from mmrazor_quant.qscheme import QScheme

TINY, LARGEST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
ranges = st.tuples(*[st.floats(np.float32(-3e38), np.float32(3e38), width=32)] * 2).map(sorted)
bit_widths = st.integers(1, 32)


def qparams(low, high, scheme):
    return ops.qparams_from_range(
        torch.tensor([low]), torch.tensor([high]), scheme.quant_min, scheme.quant_max, scheme.is_symmetry,
        scheme.is_pot_scale)  # fmt: skip


@given(ranges, bit_widths, st.booleans(), st.booleans(), st.sampled_from([None, True, False]))
@settings(max_examples=300, deadline=None)
def test_always_valid(ends, bit, is_symmetry, is_pot_scale, is_signed):
    scheme = QScheme(bit=bit, is_symmetry=is_symmetry, is_pot_scale=is_pot_scale, is_signed=is_signed)
    scale, zero_point = qparams(*ends, scheme)
    assert scale.dtype == torch.float32
    assert TINY <= scale.item() < float('inf') and TINY <= (1 / scale).item() < float('inf')
    assert scheme.quant_min <= zero_point.item() <= scheme.quant_max
    assert not is_symmetry or zero_point.item() == 0
    zero = ops.fake_quantize(torch.zeros(1), scale, zero_point, scheme.quant_min, scheme.quant_max)
    assert zero.item() == 0
    if is_pot_scale:
        assert torch.frexp(scale).mantissa.item() == 0.5


@given(st.tuples(st.floats(-1e4, 1e4, width=32), st.floats(-1e4, 1e4, width=32)).map(sorted))
@settings(max_examples=100, deadline=None)
@pytest.mark.parametrize('bit', [2, 4, 8])
@pytest.mark.parametrize('is_symmetry', [True, False])
def test_equals_torch(bit, is_symmetry, ends):
    if max(-ends[0], ends[1]) < 1e-3:
        return  # torch keeps scales above eps
    scheme = QScheme(bit=bit, is_symmetry=is_symmetry)
    theirs = MinMaxObserver(
        dtype=scheme.dtype, qscheme=scheme.torch_qscheme, quant_min=scheme.quant_min, quant_max=scheme.quant_max
    )
    theirs(torch.tensor(ends))
    scale, zero_point = theirs.calculate_qparams()
    ours = qparams(*ends, scheme)
    assert ours[0].item() == scale.item() and ours[1].item() == zero_point.item()


@pytest.mark.parametrize(
    'low, high, scheme, scale, zero_point',
    [
        (-1.0, 3.0, QScheme(bit=2, is_symmetry=False), 4 / 3, 1),
        (-1.0, 3.0, QScheme(bit=2, is_symmetry=False, is_signed=True), 4 / 3, -1),
        (1.0, 3.0, QScheme(bit=2, is_symmetry=False), 1.0, 0),
        (-3.0, -1.0, QScheme(bit=2, is_symmetry=False), 1.0, 3),
        (-1.0, 3.0, QScheme(bit=2), 2.0, 0),
        (0.0, 3.0, QScheme(bit=2, is_signed=False), 1.0, 0),
        (-2.0, 0.0, QScheme(bit=1), 2.0, 0),
        (0.0, 0.0, QScheme(), 1.0, 0),
        (0.0, 0.0, QScheme(is_symmetry=False, is_signed=True), 1.0, -128),
        (0.0, 5.0, QScheme(bit=2, is_signed=False, is_pot_scale=True), 2.0, 0),
        (0.0, 4.0, QScheme(bit=2, is_signed=False, is_pot_scale=True), 1.0, 0),
        (-1.0, 3.0, QScheme(bit=2, is_symmetry=False, is_pot_scale=True), 1.0, 1),
    ],
)
def test_values(low, high, scheme, scale, zero_point):
    s, z = qparams(low, high, scheme)
    assert s.item() == torch.tensor(scale).item() and z.item() == zero_point


def test_ends_of_float32():
    for scheme in (QScheme(), QScheme(is_symmetry=False)):
        scale, zero_point = qparams(-LARGEST, LARGEST, scheme)
        x = torch.tensor([-0.99, 0.3, 0.99]) * LARGEST
        y = ops.fake_quantize(x, scale, zero_point, scheme.quant_min, scheme.quant_max)
        assert torch.isfinite(y).all() and ((y - x).abs() <= scale * 1.01).all()
        assert qparams(0.0, 1e-44, scheme)[0].item() >= TINY


def test_eps_is_a_lower_bound():
    scale, _ = ops.qparams_from_range(torch.zeros(1), torch.full((1,), 1e-6), 0, 255, False, eps=2.0**-12)
    assert scale.item() == 2.0**-12


def test_wide_ranges_have_wide_zero_points():
    scheme = QScheme(bit=32, is_symmetry=False)
    _, zero_point = qparams(-3.0, 1.0, scheme)
    assert zero_point.dtype == torch.int64 and abs(zero_point.item() / 2**32 - 0.75) < 1e-6
    assert qparams(-3.0, 1.0, QScheme(bit=31, is_symmetry=False))[1].dtype == torch.int32


def test_shapes_follow_the_range():
    low, high = -torch.rand(3, 5), torch.rand(3, 5)
    scale, zero_point = ops.qparams_from_range(low, high, 0, 255, symmetric=False)
    assert scale.shape == zero_point.shape == (3, 5)


@given(st.floats(TINY, 1 / TINY, width=32))
@settings(max_examples=200, deadline=None)
def test_power_of_two_is_the_nearest(value):
    nearest = 2.0 ** np.round(np.log2(np.float64(value)))
    rounded = ops.round_to_power_of_two(torch.tensor([value])).item()
    if rounded != min(nearest, 2.0**126):
        assert abs(np.log2(np.float64(value)) % 1 - 0.5) < 1e-6  # too close to tell
