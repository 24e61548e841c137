"""Properties of every scheme's grid, against the formulas in float64 NumPy."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import torch
from hypothesis import given, settings

from mmrazor_quant import ops
from mmrazor_quant.qscheme import QScheme

MANY = settings(max_examples=200, deadline=None, derandomize=True)
EPS = 2.0**-23

magnitudes = st.floats(-6, 6).map(lambda e: 10.0**e)


@st.composite
def schemes(draw, **fixed):
    """Any scheme that is allowed."""
    fields = dict(bit=draw(st.integers(1, 32)), is_symmetry=draw(st.booleans()), is_pot_scale=draw(st.booleans()))
    fields['is_signed'] = draw(st.sampled_from([None, True, False]))
    fields['is_per_channel'] = draw(st.booleans())
    signed = fields['is_symmetry'] if fields['is_signed'] is None else fields['is_signed']
    fields['is_symmetric_range'] = draw(st.booleans()) and signed and fields['bit'] > 1
    return QScheme(**{**fields, **fixed})


@st.composite
def cases(draw):
    """A scheme, a tensor with its channels in some dimension, and the scale and zero point of its range."""
    scheme = draw(schemes())
    shape = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=4)))
    axis = draw(st.integers(0, len(shape) - 1)) if scheme.is_per_channel else -1
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    x = generator.normal(size=shape) * draw(magnitudes)
    x = np.abs(x) if draw(st.booleans()) else x + draw(st.floats(-2, 2)) * np.abs(x).max()
    if draw(st.booleans()):
        x.flat[0] = 0.0
    x = torch.from_numpy(x.astype(np.float32))
    dims = [d for d in range(x.dim()) if d != axis]
    low, high = (x.reshape(-1).amin(0, True), x.reshape(-1).amax(0, True)) if axis == -1 else (
        x.amin(dims) if dims else x, x.amax(dims) if dims else x)  # fmt: skip
    # Clipped as well: the range may be narrower than the data.
    narrow = draw(st.sampled_from([1.0, 0.5]))
    qparams = ops.qparams_from_range(
        low * narrow, high * narrow, scheme.quant_min, scheme.quant_max, scheme.is_symmetry, scheme.is_pot_scale
    )
    return scheme, x, axis, *qparams


def along(values: torch.Tensor, x: torch.Tensor, axis: int) -> np.ndarray:
    """Parameters in float64, with the dimensions of the tensor."""
    values = values.to(torch.float64).numpy()
    return values if axis == -1 else values.reshape([-1 if d == axis else 1 for d in range(x.dim())])


def candidates(x: np.ndarray, scale: np.ndarray, zero: np.ndarray, scheme: QScheme) -> tuple[np.ndarray, np.ndarray]:
    """The integers that an exact calculation and one with float32's error in x / scale may round to."""
    u = x.astype(np.float64) / scale
    # Above 24 bits it is calculated in float64.
    unit = 2 * EPS if max(-scheme.quant_min, scheme.quant_max, scheme.quant_max - scheme.quant_min) < 2**24 else 2e-15
    error = np.abs(u) * unit
    return tuple(np.clip(np.rint(u + e) + zero, scheme.quant_min, scheme.quant_max) for e in (-error, error))


def quantize(case):
    scheme, x, axis, scale, zero_point = case
    return ops.fake_quantize(x, scale, zero_point, scheme.quant_min, scheme.quant_max, axis)


@given(cases())
@MANY
def test_equals_numpy(case):
    """Integers and values, up to ties that are closer than float32 can tell."""
    scheme, x, axis, scale, zero_point = case
    s, z = along(scale, x, axis), along(zero_point, x, axis)
    lowest, highest = candidates(x.numpy(), s, z, scheme)

    q = ops.quantize(x, scale, zero_point, scheme.quant_min, scheme.quant_max, axis)

    assert q.dtype == ops.integer_dtype(scheme.quant_min, scheme.quant_max)
    assert ((lowest <= q.numpy()) & (q.numpy() <= highest)).all()
    wanted = (q.to(torch.float64).numpy() - z) * s
    for y in (ops.dequantize(q, scale, zero_point, axis), quantize(case)):
        assert y.dtype == torch.float32
        np.testing.assert_allclose(y.numpy().astype(np.float64), wanted, rtol=EPS, atol=0)


def test_most_of_the_time_there_is_one_candidate():
    """The comparison above is as sharp as it looks."""
    x, scale = np.random.default_rng(0).normal(size=10000).astype(np.float32), np.array(8 / 255)
    for bit, share in ((8, 1e-3), (16, 0.1), (25, 2e-3)):
        scheme = QScheme(bit=bit)
        lowest, highest = candidates(x, scale * 2.0 ** (8 - bit), np.array(0.0), scheme)
        assert (lowest != highest).mean() < share


@given(cases())
@MANY
def test_properties(case):
    scheme, x, axis, scale, zero_point = case
    s, z = along(scale, x, axis), along(zero_point, x, axis)
    y = quantize(case)

    again = quantize((scheme, y, axis, scale, zero_point))
    assert torch.equal(again, y), 'idempotent'
    steps = y.numpy().astype(np.float64) / s
    integers = np.rint(steps)
    assert (np.abs(steps - integers) <= EPS * np.abs(integers)).all(), 'on the grid'
    low, high = scheme.quant_min - z, scheme.quant_max - z
    assert ((integers >= low * (1 + EPS) - 0.5) & (integers <= high + np.abs(high) * EPS + 0.5)).all(), 'in the range'
    inside = (x.numpy() >= low * s) & (x.numpy() <= high * s)
    error = np.abs(y.numpy().astype(np.float64) - x.numpy())
    allowed = s / 2 + 1.5 * EPS * np.maximum(np.abs(x.numpy()), np.abs(y.numpy()))
    assert (error <= allowed)[inside].all(), 'half a step'
    nearest_end = np.where(x.numpy() < low * s, low * s, high * s)
    outside = np.abs(y.numpy() - nearest_end) <= EPS * np.abs(nearest_end)
    assert outside[~inside].all(), 'clipped to the end'


@given(cases())
@MANY
def test_zero_is_represented_exactly(case):
    scheme, x, axis, scale, zero_point = case
    zero = torch.zeros_like(x)
    q = ops.quantize(zero, scale, zero_point, scheme.quant_min, scheme.quant_max, axis)
    assert np.array_equal(q.numpy(), np.broadcast_to(along(zero_point, x, axis), x.shape))
    assert (quantize((scheme, zero, axis, scale, zero_point)) == 0).all()


@given(schemes(is_per_channel=False), st.integers(0, 2**32 - 1), magnitudes)
@MANY
def test_monotone(scheme, seed, magnitude):
    x = np.sort(np.random.default_rng(seed).normal(size=50) * magnitude).astype(np.float32)
    x = torch.from_numpy(x)
    qparams = ops.qparams_from_range(
        x[:1] / 2, x[-1:] / 2, scheme.quant_min, scheme.quant_max, scheme.is_symmetry, scheme.is_pot_scale
    )
    assert (quantize((scheme, x, -1, *qparams)).diff() >= 0).all()


@given(st.integers(25, 32), st.booleans(), st.booleans(), st.integers(0, 2**32 - 1), magnitudes)
@MANY
def test_more_than_24_bits_are_no_worse_than_float32(bit, is_symmetry, is_pot_scale, seed, magnitude):
    """Whatever is in the range changes by half a step and one rounding to float32 at most."""
    scheme = QScheme(bit=bit, is_symmetry=is_symmetry, is_pot_scale=is_pot_scale)
    x = torch.from_numpy((np.random.default_rng(seed).normal(size=50) * magnitude).astype(np.float32))
    scale, zero_point = ops.qparams_from_range(
        x.min().reshape(1), x.max().reshape(1), scheme.quant_min, scheme.quant_max, is_symmetry, is_pot_scale
    )
    y = quantize((scheme, x, -1, scale, zero_point)).double()
    s, z = scale.double(), zero_point.double()
    inside = (x >= (scheme.quant_min - z) * s) & (x <= (scheme.quant_max - z) * s)
    assert inside.sum() >= 25
    assert ((y - x.double()).abs() <= s / 2 + EPS / 2 * x.double().abs())[inside].all()


@given(cases())
@MANY
def test_the_grid_covers_the_range_it_was_made_for(case):
    """But for a power-of-two scale, which may be smaller; and a signed symmetric grid's upper end, by half a step."""
    scheme, x, axis, _, _ = case
    if scheme.is_pot_scale or (scheme.is_symmetry and not scheme.signed):
        return
    dims = [d for d in range(x.dim()) if d != axis]
    low, high = (x.min().reshape(1), x.max().reshape(1)) if axis == -1 else (
        x.amin(dims) if dims else x, x.amax(dims) if dims else x)  # fmt: skip
    scale, zero = ops.qparams_from_range(low, high, scheme.quant_min, scheme.quant_max, scheme.is_symmetry)
    if scheme.quant_max == 0:  # 1 bit, symmetric: positive values are lost
        high = high.clamp(max=0.0)
    s, z = scale.double(), zero.double()
    slack = (0.5 + 1e-6) * s + 4 * EPS * torch.maximum(low.abs(), high.abs()).double()
    assert (low.double() >= (scheme.quant_min - z) * s - slack).all()
    assert (high.double() <= (scheme.quant_max - z) * s + slack).all()
