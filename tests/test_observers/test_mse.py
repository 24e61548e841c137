"""Ranges of least error, against exhaustive search on the data themselves."""

from __future__ import annotations

import functools

import pytest
import torch

from mmrazor_quant import ops
from mmrazor_quant.observers import EMAMSEObserver, MinMaxObserver, MSEObserver
from mmrazor_quant.qscheme import QScheme


def gaussian(n):
    return torch.randn(n)


def laplacian(n):
    return torch.distributions.Laplace(0.0, 1.0).sample((n,))


def rectified(n):
    return torch.randn(n).relu()


def uniform(n):
    return 2 * torch.rand(n) - 1


def outliers(n):
    x = torch.randn(n)
    x[torch.randperm(n)[:5]] *= 50
    return x


def one_sided_outliers(n):
    x = torch.randn(n)
    x[torch.randperm(n)[:20]] = 25
    return x


def clipped_below(n):
    return (torch.randn(n).exp() - 1).clamp(min=-0.5)


DATA = [gaussian, laplacian, rectified, uniform, outliers, one_sided_outliers, clipped_below]


def error(x, scale, zero_point, scheme, p):
    """Sum |x - fq(x)|^p for candidates of scale and zero point, shape [M]."""
    low, high = scheme.quant_min, scheme.quant_max
    diffs = [ops.fake_quantize(x, s, z, low, high) - x for s, z in zip(scale, zero_point)]
    return torch.stack([(d.square() if p == 2 else d.abs().pow(p)).sum(dtype=torch.float64) for d in diffs])


def best_error(x, scheme, p):
    """Exhaustive search: a grid of ranges, then twice a finer one around the best."""

    def evaluate(low, high):
        return error(x, *ops.qparams_from_range(low, high, *integers, scheme.is_symmetry), scheme, p)

    integers = scheme.quant_min, scheme.quant_max
    low, high = x.min().clamp(max=0), x.max().clamp(min=0)
    if scheme.is_symmetry:
        # Slightly beyond the data, since there is one positive integer less than negative ones.
        t = torch.maximum(-low, high) * torch.linspace(0.01, 1.5 if scheme.bit == 2 else 1.1, 150)
        errors = evaluate(-t, t)
        t = t[errors.argmin()] * torch.linspace(0.97, 1.03, 20)
        return min(errors.min(), evaluate(-t, t).min())
    steps = torch.linspace(1 / 12, 1, 12)
    pairs = torch.cartesian_prod(low * steps if low < 0 else low[None], high * torch.linspace(1 / 24, 1, 24))
    least = float('inf')
    for width in (0.08, 0.03, 0):
        errors = evaluate(pairs[:, 0], pairs[:, 1])
        least = min(least, errors.min())
        best = pairs[errors.argmin()]
        near = torch.linspace(1 - width, 1 + width, 5)
        pairs = torch.cartesian_prod((best[0] * near).clamp(min=low), (best[1] * near).clamp(max=high)).unique(dim=0)
    return least


@functools.cache
def problem(data, scheme, p):
    """Some data and their best error."""
    torch.manual_seed(3)
    x = data(40000)
    return x, best_error(x, scheme, p)


@pytest.mark.parametrize('data', DATA)
@pytest.mark.parametrize('is_symmetry', [True, False], ids=['symmetric', 'asymmetric'])
@pytest.mark.parametrize('bit, p', [(2, 2.0), (4, 2.4), (8, 2.0)])
@pytest.mark.parametrize('way', ['values', 'histogram', 'sample'])
def test_error_is_within_two_percent_of_the_best(data, is_symmetry, bit, p, way):
    scheme = QScheme(bit=bit, is_symmetry=is_symmetry)
    x, best = problem(data, scheme, p)
    max_samples = {'values': None, 'histogram': None, 'sample': 10000}[way]
    observer = MSEObserver(**scheme.observer_params(), p=p, exact=way == 'values', max_samples=max_samples)
    observer(x)
    if way == 'histogram':
        observer.load_state_dict(observer.state_dict())  # forgets the values that were kept
    found = error(x, *observer.calculate_qparams(), scheme, p)
    assert found <= 1.02 * best + 1e-9


def test_per_channel_is_each_channel_by_itself():
    x = torch.stack([data(2000) * (i + 1) for i, data in enumerate(DATA)])
    for symmetric in (True, False):
        whole = MSEObserver(**QScheme(bit=4, is_symmetry=symmetric, is_per_channel=True).observer_params(), p=2.4)
        whole(x)
        scale, zero_point = whole.calculate_qparams()
        for i, row in enumerate(x):
            single = MSEObserver(**QScheme(bit=4, is_symmetry=symmetric).observer_params(), p=2.4, exact=True)
            single(row)
            torch.testing.assert_close(single.calculate_qparams()[0], scale[i : i + 1], rtol=1e-4, atol=0)
            assert abs(single.calculate_qparams()[1] - zero_point[i]) <= 1


def test_histogram_gathers_all_batches():
    """Batches of growing range give what all of them at once do."""
    batches = [torch.randn(30000) * s for s in (0.1, 1.0, 0.5, 3.0)]
    scheme = QScheme(bit=4, is_symmetry=False)
    observer = MSEObserver(**scheme.observer_params(), max_samples=8000)
    for x in batches:
        observer(x)
    everything = torch.cat(batches)
    assert observer.counts.sum() == pytest.approx(len(everything), rel=0.01)
    assert observer.min_val == everything.min() and observer.max_val == everything.max()
    found = error(everything, *observer.calculate_qparams(), scheme, 2.0)
    assert found <= 1.02 * best_error(everything, scheme, 2.0)


def test_values_are_kept_until_there_are_many():
    scheme = QScheme(bit=8)
    observer = MSEObserver(**scheme.observer_params(), max_samples=100)
    exact = MSEObserver(**scheme.observer_params(), exact=True)
    x = torch.randn(80)
    for part in x.split(40):
        observer(part)
    exact(x)
    assert torch.equal(observer.calculate_qparams()[0], exact.calculate_qparams()[0])
    observer(torch.randn(40))
    assert observer._kept is None


def test_outlier_channel_is_not_missed():
    """Outliers that lie together share blocks; the sample then says how many there are."""
    x = torch.randn(64, 8, 12, 12)
    x[:, 3] *= 20
    scheme = QScheme(bit=8)
    observer = MSEObserver(**scheme.observer_params(), max_samples=8000)
    observer(x)
    found = error(x, *observer.calculate_qparams(), scheme, 2.0)
    assert found <= 1.02 * best_error(x, scheme, 2.0)


def test_better_than_min_max_where_it_can_be():
    x = outliers(20000)
    scheme = QScheme(bit=4)
    errors = []
    for kind in (MSEObserver, EMAMSEObserver, MinMaxObserver):
        observer = kind(**scheme.observer_params())
        observer(x)
        errors.append(error(x, *observer.calculate_qparams(), scheme, 2.0))
    assert errors[0] < errors[2] / 2 and errors[1] < errors[2] / 2


def test_average_of_best_ranges():
    scheme = QScheme(bit=4)
    batches = [torch.randn(20000) * s for s in (1, 2, 4)]
    observer = EMAMSEObserver(**scheme.observer_params(), ema_ratio=0.5)
    scale = None
    for x in batches:
        observer(x)
        single = EMAMSEObserver(**scheme.observer_params())
        single(x)
        new = single.calculate_qparams()[0]
        scale = new if scale is None else (scale + new) / 2
    torch.testing.assert_close(observer.calculate_qparams()[0], scale)


def test_power_of_two_scale_is_the_best_one():
    x = gaussian(20000)
    scheme = QScheme(bit=4, is_pot_scale=True)
    observer = MSEObserver(**scheme.observer_params(), exact=True)
    observer(x)
    powers = 2.0 ** torch.arange(-6, 3).unsqueeze(1)
    errors = error(x, powers, torch.zeros_like(powers), scheme, 2.0)
    assert observer.calculate_qparams()[0] == powers[errors.argmin()]


@pytest.mark.parametrize('name, value', [('p', 0), ('p', -1), ('bins', 1), ('max_samples', 0)])
def test_refused_arguments(name, value):
    with pytest.raises(ValueError, match=f'{name}: got {value}'):
        MSEObserver(**QScheme().observer_params(), **{name: value})
