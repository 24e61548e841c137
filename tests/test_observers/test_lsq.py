"""Start values of learned step sizes, by their formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mmrazor_quant.observers import LSQObserver, LSQPlusObserver
from mmrazor_quant.qscheme import QScheme

BITS = [1, 2, 3, 4, 8, 16, 32]


def observe(kind, scheme, *batches, **kwargs):
    observer = kind(**scheme.observer_params(), **kwargs)
    for x in batches:
        observer(x)
    return observer


def batches():
    """The same ones at each call."""
    random = torch.Generator().manual_seed(1)
    return [torch.randn(7, 5, 40, generator=random) * (i + 1) + 0.3 for i in range(3)]


def rows(scheme, tensors):
    """All values in float64, one row per channel."""
    axis = scheme.ch_axis if scheme.is_per_channel else None
    values = [x.numpy().astype(np.float64) for x in tensors]
    return np.concatenate([v.reshape(1, -1) if axis is None else np.moveaxis(v, axis, 0).reshape(v.shape[axis], -1)
                           for v in values], 1)  # fmt: skip


@pytest.mark.parametrize('bit', BITS)
@pytest.mark.parametrize('is_signed', [True, False])
@pytest.mark.parametrize('is_per_channel', [True, False])
def test_symmetric_step(bit, is_signed, is_per_channel):
    scheme = QScheme(bit=bit, is_signed=is_signed, is_per_channel=is_per_channel, ch_axis=1)
    data = [x if is_signed else x.relu() for x in batches()]
    levels = scheme.quant_max or 1
    expected = 2 * np.abs(rows(scheme, data)).mean(1) / np.sqrt(levels)
    scale, zero_point = observe(LSQObserver, scheme, *data).calculate_qparams()
    np.testing.assert_allclose(scale, expected, rtol=2e-6)
    assert not zero_point.any()


def test_symmetric_range_has_as_many_positive_levels():
    scheme = QScheme(bit=4, is_symmetric_range=True)
    expected = 2 * np.abs(rows(scheme, batches())).mean(1) / np.sqrt(7)
    np.testing.assert_allclose(observe(LSQObserver, scheme, *batches()).calculate_qparams()[0], expected, rtol=2e-6)


@pytest.mark.parametrize('bit', BITS)
@pytest.mark.parametrize('is_signed', [True, False])
@pytest.mark.parametrize('sign', [1, -1])
def test_asymmetric_step_of_data_of_one_sign(bit, is_signed, sign):
    scheme = QScheme(bit=bit, is_symmetry=False, is_signed=is_signed)
    data = [sign * x.relu() for x in batches()]
    expected = 2 * np.abs(rows(scheme, data)).mean(1) / np.sqrt(2**bit - 1)
    scale, zero_point = observe(LSQObserver, scheme, *data).calculate_qparams()
    np.testing.assert_allclose(scale, expected, rtol=2e-6)
    assert zero_point.item() == (scheme.quant_min if sign > 0 else scheme.quant_max)


@pytest.mark.parametrize('bit', BITS)
@pytest.mark.parametrize('is_signed', [True, False])
@pytest.mark.parametrize('sign', [1, -1])
def test_asymmetric_step_of_data_of_both_signs(bit, is_signed, sign):
    scheme = QScheme(bit=bit, is_symmetry=False, is_signed=is_signed)
    data = [sign * x for x in batches()]
    half = 2 ** (bit - 1)
    expected = 2 * np.abs(rows(scheme, data)).mean(1) / np.sqrt(max(half - 1, 1))
    scale, zero_point = observe(LSQObserver, scheme, *data).calculate_qparams()
    np.testing.assert_allclose(scale, expected, rtol=2e-6)
    # The heavier side has one level more: of 16, 7 on one side of zero and 8 on the other.
    middle = scheme.quant_min + (half - 1 if sign > 0 else half)
    assert abs(zero_point.item() - middle) <= 2 ** (bit - 24)  # as float32 has 24 bits


def test_far_more_values_than_float32_can_count_one_by_one():
    observer = observe(LSQObserver, QScheme(), torch.ones(1000))
    observer.count.fill_(2.0**30)
    observer(torch.full((2**20,), 1025.0))
    assert observer.positive.item() == pytest.approx(1 + 1024 / 1025, rel=1e-5)


@pytest.mark.parametrize('bit', BITS)
@pytest.mark.parametrize('sigmas', [3.0, 2.0])
def test_plus_symmetric(bit, sigmas):
    scheme = QScheme(bit=bit, is_per_channel=True, ch_axis=1)
    values = rows(scheme, batches())
    mean, std = values.mean(1), values.std(1)
    end = np.maximum(np.abs(mean - sigmas * std), np.abs(mean + sigmas * std))
    scale, _ = observe(LSQPlusObserver, scheme, *batches(), sigmas=sigmas).calculate_qparams()
    np.testing.assert_allclose(scale, end / 2 ** (bit - 1), rtol=1e-5)
    unsigned = QScheme(bit=bit, is_per_channel=True, ch_axis=1, is_signed=False)
    scale, _ = observe(LSQPlusObserver, unsigned, *batches(), sigmas=sigmas).calculate_qparams()
    np.testing.assert_allclose(scale, end / 2**bit, rtol=1e-5)


@pytest.mark.parametrize('is_per_channel', [True, False])
@pytest.mark.parametrize('shift, spread', [(0, 1), (2, 1), (-500, 0.1)])
def test_plus_asymmetric(is_per_channel, shift, spread):
    scheme = QScheme(is_symmetry=False, is_per_channel=is_per_channel, ch_axis=1)
    data = [x.exp().clamp(max=8) * spread + shift for x in batches()]
    values = rows(scheme, data)
    mean, std = values.mean(1), values.std(1)
    low, high = observe(LSQPlusObserver, scheme, *data).observed_range()
    np.testing.assert_allclose(low, np.maximum(values.min(1), mean - 3 * std), rtol=1e-4)
    np.testing.assert_allclose(high, np.minimum(values.max(1), mean + 3 * std), rtol=1e-4)


@pytest.mark.parametrize('value', [0.1, 2.5, -1e30, 1e-30])
def test_plus_of_a_constant(value):
    """Rounding of the mean neither makes the range empty nor widens it."""
    for symmetric in (True, False):
        observer = observe(LSQPlusObserver, QScheme(is_symmetry=symmetric), *[torch.full((1000,), value)] * 3)
        low, high = observer.observed_range()
        observer.calculate_qparams()
        if not symmetric:
            assert low == high == torch.tensor(value)
        else:
            np.testing.assert_allclose(observer.calculate_qparams()[0], abs(value) / 128, rtol=1e-3)


@pytest.mark.parametrize('value', [0, -3.0, float('inf'), float('nan')])
def test_refused_sigmas(value):
    with pytest.raises(ValueError, match='sigmas: got'):
        LSQPlusObserver(**QScheme().observer_params(), sigmas=value)
