"""Percentile ranges against NumPy's quantiles."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmrazor_quant import ops
from mmrazor_quant.observers import EMAPercentileObserver, MinMaxObserver, PercentileObserver, quantiles
from mmrazor_quant.observers.histogram import count_values
from mmrazor_quant.qscheme import QScheme

ASYMMETRIC = QScheme(is_symmetry=False)
DATA = {
    'gaussian': lambda n: torch.randn(n),
    'rectified': lambda n: torch.randn(n).relu(),
    'heavy tails': lambda n: torch.distributions.StudentT(3.0).sample((n,)),
    'shifted': lambda n: torch.rand(n) + 3,
    'negative': lambda n: -torch.randn(n).exp(),
}


def observe(kind, scheme, *batches, **kwargs):
    observer = kind(**scheme.observer_params(), **kwargs)
    for x in batches:
        observer(x)
    return [v.numpy() for v in observer.observed_range()]


def expected(x, scheme, percentile, more=0.0):
    """The range by NumPy, of the last dimension; one that holds a greater share of the values by ``more``."""
    x, clipped = np.asarray(x, dtype=np.float64), (100 - percentile) / 100
    if not scheme.is_symmetry:
        return np.quantile(x, clipped / 2 - more, axis=-1), np.quantile(x, 1 - clipped / 2 + more, axis=-1)
    end = np.quantile(np.abs(x), 1 - clipped + more, axis=-1)
    return -end, end


@pytest.mark.parametrize('name', DATA)
@pytest.mark.parametrize('percentile', [99.99, 99.9, 99, 90])
@pytest.mark.parametrize('scheme', [QScheme(), ASYMMETRIC], ids=['symmetric', 'asymmetric'])
def test_quantiles_of_all_batches(name, percentile, scheme):
    batches = [DATA[name](60000) * s for s in (1.0, 0.3, 1.5)]
    everything = torch.cat(batches)
    low, high = observe(PercentileObserver, scheme, *batches, percentile=percentile, max_samples=None)
    # Up to the width of a bin, between the values next to those that NumPy interpolates between.
    width = 0.003 * everything.abs().max().item()
    narrow, wide = (expected(everything, scheme, percentile, more / len(everything)) for more in (-2, 2))
    assert wide[0] - width <= low.item() <= narrow[0] + width
    assert narrow[1] - width <= high.item() <= wide[1] + width


@pytest.mark.parametrize('percentile', [99.99, 99.9, 99])
def test_tails_of_sampled_batches(percentile):
    batches = [DATA['heavy tails'](300000) for _ in range(3)]
    found = observe(PercentileObserver, ASYMMETRIC, *batches, percentile=percentile, max_samples=2**15)
    for one, other in zip(found, expected(torch.cat(batches), ASYMMETRIC, percentile)):
        assert one.item() == pytest.approx(other, rel=0.1)


@pytest.mark.parametrize('scheme', [QScheme(), ASYMMETRIC], ids=['symmetric', 'asymmetric'])
def test_everything_is_the_range_of_the_data(scheme):
    x = torch.randn(5000) * 3 + 1
    low, high = observe(PercentileObserver, scheme, x, percentile=100)
    if scheme.is_symmetry:
        assert high.item() == pytest.approx(x.abs().max().item(), rel=1e-5)
    else:
        assert (low.item(), high.item()) == pytest.approx((x.min().item(), x.max().item()), rel=1e-5)


def test_grids_of_one_sign_clip_at_the_end_they_have():
    x = torch.randn(100000)
    unsigned, one_bit = QScheme(is_signed=False), QScheme(bit=1)
    for kind in (PercentileObserver, EMAPercentileObserver):
        _, high = observe(kind, unsigned, x, percentile=99, max_samples=None)
        low, _ = observe(kind, one_bit, x, percentile=99, max_samples=None)
        assert high.item() == pytest.approx(np.quantile(x.numpy(), 0.99), rel=0.01)
        assert low.item() == pytest.approx(np.quantile(x.numpy(), 0.01), rel=0.01)


@pytest.mark.parametrize('scheme', [QScheme(is_per_channel=True), QScheme(is_symmetry=False, is_per_channel=True)])
def test_moving_average_of_exact_quantiles(scheme):
    batches = [torch.randn(3, 500) * (i + 1) for i in range(4)]
    low, high = observe(EMAPercentileObserver, scheme, *batches, percentile=97, ema_ratio=0.75)
    average = None
    for x in batches:
        new = np.stack(expected(x, scheme, 97))
        average = new if average is None else 0.75 * average + 0.25 * new
    np.testing.assert_allclose(np.stack([low, high]), average, rtol=1e-5)


def test_large_batches_are_estimated():
    x = torch.randn(2, 200000)
    scheme = QScheme(is_symmetry=False, is_per_channel=True)
    found = observe(EMAPercentileObserver, scheme, x, percentile=99.9, max_samples=2**15)
    np.testing.assert_allclose(np.stack(found), np.stack(expected(x, scheme, 99.9)), rtol=0.06)


def test_outliers_are_clipped():
    x = torch.randn(400000)
    x[:10] = 1000.0
    errors = []
    for kind in (PercentileObserver, MinMaxObserver):
        observer = kind(**ASYMMETRIC.observer_params())
        observer(x)
        inner = x[10:]
        errors.append((ops.fake_quantize(inner, *observer.calculate_qparams(), 0, 255) - inner).square().mean())
    assert errors[0] < errors[1] / 1000


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=40),
    share=st.floats(0, 1),
)
def test_a_quantile_of_a_histogram_divides_the_values(values, share):
    rows = torch.tensor([values])
    low, high = rows.amin(1), rows.amax(1)
    counts = count_values(rows, low, high, 256)
    bin_width = 0.02 * rows.abs().max().item() + 1e-6
    found = quantiles.histogram_quantile(counts, low, high, share)
    assert low <= found <= high
    assert (rows < found - bin_width).sum() <= share * len(values) + 1e-3
    assert (rows > found + bin_width).sum() <= (1 - share) * len(values) + 1e-3
    magnitude = quantiles.magnitude_quantile(counts, low, high, share)
    assert 0 <= magnitude <= rows.abs().max()
    assert (rows.abs() < magnitude - bin_width).sum() <= share * len(values) + 1e-3
    assert (rows.abs() > magnitude + bin_width).sum() <= (1 - share) * len(values) + 1e-3


@pytest.mark.parametrize('kind', [PercentileObserver, EMAPercentileObserver])
@pytest.mark.parametrize('value', [0, -1, 100.1, float('nan')])
def test_refused_percentiles(kind, value):
    with pytest.raises(ValueError, match=f'percentile: got {value}'):
        kind(**QScheme().observer_params(), percentile=value)
