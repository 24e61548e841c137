"""Properties of every scheme's grid, against the formulas in float64 NumPy."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from random_schemes import magnitudes, schemes, seeds

from mmrazor_quant import ops
from mmrazor_quant.ops import compiled
from mmrazor_quant.qscheme import QScheme

MANY = settings(max_examples=200, deadline=None, derandomize=True)
FEW = settings(MANY, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
EPS = 2.0**-23

SMALL = st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple)
LARGE = st.just((4, 8, 2**9))
"""Of as many elements as compiled code is used for, if not of more."""


@pytest.fixture
def compiling(compile_at_once):
    """Use compiled code for large tensors; see that it was used."""
    before = compiled._compile.cache_info()
    yield
    after = compiled._compile.cache_info()
    assert after.hits + after.misses > before.hits + before.misses


@st.composite
def cases(draw, shapes=SMALL):
    """A scheme, a tensor with its channels in some dimension, and the scale and zero point of its range."""
    scheme = draw(schemes())
    shape = draw(shapes)
    axis = draw(st.integers(0, len(shape) - 1)) if scheme.is_per_channel else -1
    generator = np.random.default_rng(draw(seeds))
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
    check_against_numpy(case)


@given(cases(LARGE))
@FEW
def test_compiled_code_equals_numpy(compiling, case):
    check_against_numpy(case)


def check_against_numpy(case):
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
    check_properties(case)


@given(cases(LARGE))
@FEW
def test_properties_of_compiled_code(compiling, case):
    check_properties(case)


def check_properties(case):
    scheme, x, axis, scale, zero_point = case
    s, z = along(scale, x, axis), along(zero_point, x, axis)
    y = quantize(case)

    again = quantize((scheme, y, axis, scale, zero_point))
    steps = y.numpy().astype(np.float64) / s
    integers = np.rint(steps)
    # Float32 is wrong by up to three roundings of x / scale: from 22 bits on that may be half a step.
    exact = (np.abs(integers) * 1.5 * EPS < 0.5) | (scheme.bit > 24)
    assert (again == y).numpy()[exact].all(), 'idempotent'
    assert (np.abs(again.double().numpy() - y.double().numpy()) <= s * (1 + EPS * np.abs(integers)))[~exact].all()
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
    check_zero(case)


@given(cases(LARGE))
@FEW
def test_compiled_code_represents_zero_exactly(compiling, case):
    check_zero(case)


def check_zero(case):
    scheme, x, axis, scale, zero_point = case
    zero = torch.zeros_like(x)
    q = ops.quantize(zero, scale, zero_point, scheme.quant_min, scheme.quant_max, axis)
    assert np.array_equal(q.numpy(), np.broadcast_to(along(zero_point, x, axis), x.shape))
    assert (quantize((scheme, zero, axis, scale, zero_point)) == 0).all()


@given(schemes(is_per_channel=False), seeds, magnitudes)
@MANY
def test_monotone(scheme, seed, magnitude):
    check_monotone(scheme, seed, magnitude, size=50)


@given(schemes(is_per_channel=False), seeds, magnitudes)
@FEW
def test_compiled_code_is_monotone(compiling, scheme, seed, magnitude):
    check_monotone(scheme, seed, magnitude, size=2**14)


def check_monotone(scheme, seed, magnitude, size):
    x = np.sort(np.random.default_rng(seed).normal(size=size) * magnitude).astype(np.float32)
    x = torch.from_numpy(x)
    qparams = ops.qparams_from_range(
        x[:1] / 2, x[-1:] / 2, scheme.quant_min, scheme.quant_max, scheme.is_symmetry, scheme.is_pot_scale
    )
    assert (quantize((scheme, x, -1, *qparams)).diff() >= 0).all()


@given(st.integers(25, 32), st.booleans(), st.booleans(), seeds, magnitudes)
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


@st.composite
def offset_cases(draw, shapes=SMALL):
    """A scheme, sorted values with their channels in some dimension, and the scale and offset of a range they leave."""
    # With more bits steps get smaller than what float32 tells apart, this far from zero.
    scheme = draw(schemes(bit=draw(st.integers(1, 16)), is_symmetry=False))
    shape = draw(shapes)
    axis = draw(st.integers(0, len(shape) - 1)) if scheme.is_per_channel else -1
    generator = np.random.default_rng(draw(seeds))
    channels = 1 if axis == -1 else shape[axis]
    width = draw(magnitudes) * generator.uniform(1, 2, size=channels)
    low = width * generator.uniform(-4, 4, size=channels)
    rows = np.sort(generator.uniform(-0.5, 1.5, size=(channels, int(np.prod(shape)) // channels)), axis=1)
    values = torch.from_numpy((low[:, None] + width[:, None] * rows).astype(np.float32))
    rest = [n for d, n in enumerate(shape) if d != axis]
    x = values.reshape(shape) if axis == -1 else values.reshape(channels, *rest).movedim(0, axis).contiguous()
    scale = torch.from_numpy((width / (scheme.quant_max - scheme.quant_min)).astype(np.float32))
    step = ops.effective_scale(scale, scheme.is_pot_scale)
    return scheme, x, axis, scale, torch.from_numpy(low.astype(np.float32)) - scheme.quant_min * step


def quantize_offset(case):
    scheme, x, axis, scale, offset = case
    return ops.fake_quantize_offset(
        x, scale, offset, scheme.quant_min, scheme.quant_max, axis, is_pot_scale=scheme.is_pot_scale
    )


@given(offset_cases())
@MANY
def test_properties_with_an_offset(case):
    check_offset(case)


@given(offset_cases(LARGE))
@FEW
def test_properties_with_an_offset_of_compiled_code(compiling, case):
    check_offset(case)


def check_offset(case):
    """The grid of LSQ+, of which zero need not be a part."""
    scheme, x, axis, scale, offset = case
    y = quantize_offset(case)

    assert torch.equal(quantize_offset((scheme, y, axis, scale, offset)), y), 'idempotent'
    assert (by_channel(y, axis).diff(dim=1) >= 0).all(), 'monotone'
    s, o = along(ops.effective_scale(scale, scheme.is_pot_scale), x, axis), along(offset, x, axis)
    low, high = scheme.quant_min * s + o, scheme.quant_max * s + o
    x, y = (v.numpy().astype(np.float64) for v in (x, y))
    rounding = 4 * EPS * (np.abs(x) + np.abs(y) + np.abs(o))
    inside = (x >= low) & (x <= high)
    assert (np.abs(y - x) <= s / 2 + rounding)[inside].all(), 'half a step'
    assert (np.abs(y - np.where(x < low, low, high)) <= rounding)[~inside].all(), 'clipped to the end'


def by_channel(x: torch.Tensor, axis: int) -> torch.Tensor:
    """Shape [C, values of the channel]."""
    return x.reshape(1, -1) if axis == -1 else x.movedim(axis, 0).reshape(x.shape[axis], -1)
