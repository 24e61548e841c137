"""What every observer does: ranges, shapes, state, refusals."""

from __future__ import annotations

import copy

import hypothesis.extra.numpy
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmrazor_quant.observers import (
    EMAMinMaxObserver,
    EMAMSEObserver,
    EMAPercentileObserver,
    FixedRangeObserver,
    HistogramObserver,
    LSQObserver,
    LSQPlusObserver,
    MinMaxObserver,
    MSEObserver,
    PercentileObserver,
)
from mmrazor_quant.observers.histogram_base import HistogramBase
from mmrazor_quant.qscheme import QScheme
from mmrazor_quant.registry import MODELS

ESTIMATORS = [
    MinMaxObserver,
    EMAMinMaxObserver,
    MSEObserver,
    EMAMSEObserver,
    HistogramObserver,
    PercentileObserver,
    EMAPercentileObserver,
    LSQObserver,
    LSQPlusObserver,
]
OBSERVERS = [*ESTIMATORS, FixedRangeObserver]
SCHEMES = {
    'tensor-symmetric': QScheme(bit=4),
    'tensor-asymmetric': QScheme(bit=4, is_symmetry=False),
    'channel-symmetric': QScheme(bit=4, is_per_channel=True),
    'channel-asymmetric': QScheme(bit=4, is_symmetry=False, is_per_channel=True, ch_axis=1),
}


@pytest.fixture(params=OBSERVERS, ids=lambda c: c.__name__)
def kind(request):
    return request.param


@pytest.fixture(params=ESTIMATORS, ids=lambda c: c.__name__)
def estimator(request):
    """All kinds that data make a difference to."""
    return request.param


@pytest.fixture(params=SCHEMES)
def scheme(request):
    return SCHEMES[request.param]


def build(kind, scheme, **kwargs):
    needed = {'function': 'tanh'} if kind is FixedRangeObserver else {}
    return kind(**scheme.observer_params(), **needed, **kwargs)


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other))


def test_registered(kind):
    assert MODELS.get(f'mmrazor.{kind.__name__}') is kind


def test_forward_returns_its_input_and_shapes_follow_the_scheme(kind, scheme):
    observer = build(kind, scheme)
    x = torch.randn(6, 5, 4, 4, requires_grad=True)
    assert observer(x) is x
    channels = x.shape[scheme.ch_axis] if scheme.is_per_channel else 1
    scale, zero_point = observer.calculate_qparams()
    assert scale.shape == zero_point.shape == (channels,)
    assert scale.dtype == torch.float32 and not scale.requires_grad
    assert torch.isfinite(scale).all() and (scale > 0).all()
    assert same(observer.running_qparams(), (scale, zero_point))


def test_no_data_is_refused(estimator, scheme):
    observer = build(estimator, scheme)
    with pytest.raises(ValueError, match='no data'):
        observer.calculate_qparams()
    observer(torch.randn(0, 5, 4, 4))
    with pytest.raises(ValueError, match='no data'):
        observer.calculate_qparams()


@pytest.mark.parametrize('bad', ['nan', 'inf', '-inf'])
def test_nan_and_infinity_are_refused_whenever_they_came(estimator, scheme, bad):
    observer = build(estimator, scheme)
    for batch in range(3):
        x = torch.randn(6, 5, 4, 4)
        x[batch, 1, 0, 0] = float(bad) if batch == 1 or estimator is MSEObserver and scheme.is_per_channel else 0
        observer(x)
    with pytest.raises(ValueError, match='NaN or infinite'):
        observer.calculate_qparams()
    observer.reset()
    observer(torch.randn(6, 5, 4, 4))
    assert torch.isfinite(observer.calculate_qparams()[0]).all()


def test_zeros_and_constants(kind, scheme):
    for value in (0.0, 2.5, -2.5):
        observer = build(kind, scheme)
        x = torch.full((6, 5, 4, 4), value)
        x[1, 1] = 0.0
        observer(x)
        scale, zero_point = observer.calculate_qparams()
        assert torch.isfinite(scale).all() and (scale > 0).all()
        assert ((zero_point >= scheme.quant_min) & (zero_point <= scheme.quant_max)).all()


def test_all_zero_channels_get_scale_one(estimator):
    observer = build(estimator, QScheme(bit=4, is_per_channel=True))
    x = torch.randn(4, 30)
    x[2] = 0
    observer(x)
    assert observer.calculate_qparams()[0][2] == 1


def test_order_of_channels_and_of_values_does_not_matter(kind):
    x = torch.randn(6, 5, 4, 4)
    first, last = (build(kind, QScheme(bit=4, is_per_channel=True, ch_axis=axis)) for axis in (0, 3))
    first(x)
    last(x.permute(1, 2, 3, 0))
    for one, other in zip(first.calculate_qparams(), last.calculate_qparams()):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_types(kind, scheme, dtype):
    x = torch.randn(6, 5, 4, 4).to(dtype)
    observer, expected = build(kind, scheme), build(kind, scheme)
    observer(x)
    expected(x.float())
    assert same(observer.calculate_qparams(), expected.calculate_qparams())


def test_memory_format_does_not_matter(kind, scheme):
    x = torch.randn(6, 5, 4, 4)
    observer, expected = build(kind, scheme), build(kind, scheme)
    observer(x.to(memory_format=torch.channels_last))
    expected(x)
    for one, other in zip(observer.calculate_qparams(), expected.calculate_qparams()):
        torch.testing.assert_close(one, other)


def test_inference_mode_before_and_after(kind, scheme):
    x = torch.randn(6, 5, 4, 4)
    observer = build(kind, scheme)
    with torch.inference_mode():
        observer(x)
    observer(x)
    assert torch.isfinite(observer.calculate_qparams()[0]).all()


def test_set_channels_and_reset_keep_shapes(kind):
    observer = build(kind, QScheme(is_per_channel=True))
    observer.set_channels(7)
    shapes = {k: v.shape for k, v in observer.state_dict().items()}
    fresh = {k: v.clone() for k, v in observer.state_dict().items()}
    assert all(s[0] == 7 for k, s in shapes.items() if k != 'eps')
    observer(torch.randn(7, 20))
    assert {k: v.shape for k, v in observer.state_dict().items()} == shapes
    changed = any(not torch.equal(v, fresh[k]) for k, v in observer.state_dict().items())
    assert changed == (kind is not FixedRangeObserver)
    observer.reset()
    assert all(torch.equal(v, fresh[k]) for k, v in observer.state_dict().items())
    with pytest.raises(ValueError, match='8 channels after one of 7'):
        observer(torch.randn(8, 20))


def test_set_channels_of_a_per_tensor_observer(kind):
    observer = build(kind, QScheme())
    observer.set_channels(1)
    with pytest.raises(ValueError, match='set_channels: got 3'):
        observer.set_channels(3)


@pytest.mark.parametrize('prepared', [True, False])
def test_saving_and_loading_go_on_as_if_nothing_had_happened(kind, scheme, prepared):
    batches = [torch.randn(6, 5, 4, 4) * (i + 1) for i in range(4)]
    one, two = build(kind, scheme, **small(kind)), build(kind, scheme, **small(kind))
    if prepared and scheme.is_per_channel:
        two.set_channels(batches[0].shape[scheme.ch_axis])
    for x in batches[:2]:
        one(x)
    assert not two.load_state_dict(one.state_dict()).missing_keys
    assert same(one.calculate_qparams(), two.calculate_qparams())
    for observer in (one, two):
        for x in batches[2:]:
            observer(x)
    assert same(one.calculate_qparams(), two.calculate_qparams())


def small(kind):
    """Nothing kept outside the state dict."""
    return {'max_samples': 100} if kind is MSEObserver else {}


def test_copies_are_independent(estimator, scheme):
    one = build(estimator, scheme)
    one(torch.randn(6, 5, 4, 4))
    before = one.calculate_qparams()
    two = copy.deepcopy(one)
    two(100 * torch.randn(6, 5, 4, 4))
    assert same(one.calculate_qparams(), before)
    assert not same(two.calculate_qparams(), before)


def test_scale_is_a_power_of_two_where_asked_for(kind):
    for symmetric in (True, False):
        observer = build(kind, QScheme(bit=4, is_symmetry=symmetric, is_pot_scale=True))
        observer(torch.randn(1000))
        assert torch.frexp(observer.calculate_qparams()[0]).mantissa == 0.5


@pytest.mark.parametrize('bit', [1, 2, 3, 8, 9, 10, 16, 32])
@pytest.mark.parametrize('data', [torch.randn(999), torch.rand(999), -torch.rand(999), torch.zeros(9), torch.ones(1)])
def test_all_bit_widths(kind, bit, data):
    for symmetric, signed in ((True, True), (True, False), (False, True), (False, False)):
        observer = build(kind, QScheme(bit=bit, is_symmetry=symmetric, is_signed=signed))
        observer(data)
        scale, zero_point = observer.calculate_qparams()
        assert torch.isfinite(scale).all() and (scale > 0).all()
        assert observer.quant_min <= zero_point.item() <= observer.quant_max
        low, high = observer.observed_range()
        assert low <= high and low.dtype == high.dtype == torch.float32


@settings(max_examples=15, deadline=None)
@given(
    x=hypothesis.extra.numpy.arrays('float32', (2, 7), elements=st.floats(-(2.0**60), 2.0**60, width=32)),
    bit=st.sampled_from([1, 2, 4, 8]),
    symmetric=st.booleans(),
    factor=st.integers(-30, 30),
)
def test_scales_follow_the_data(x, bit, symmetric, factor):
    """Whatever the values: twice as large ones get a scale twice as large, and the scale is sane."""
    x = torch.from_numpy(x)
    x = x.where(x.abs() > 2.0**-40, 0.0)
    for kind in ESTIMATORS:
        scales = []
        for data in (x, x * 2.0**factor):
            observer = build(kind, QScheme(bit=bit, is_symmetry=symmetric, is_per_channel=True))
            observer(data)
            scale, zero_point = observer.calculate_qparams()
            assert torch.isfinite(scale).all() and (scale > 0).all()
            assert ((zero_point >= observer.quant_min) & (zero_point <= observer.quant_max)).all()
            scales.append(scale.where(data.abs().amax(1) > 0, 0.0))
        if (bit > 1 or not symmetric) and kind not in (HistogramObserver, MSEObserver, EMAMSEObserver):
            # (searches may find another local minimum; [-1, 0] has nothing for positive values)
            torch.testing.assert_close(scales[0] * 2.0**factor, scales[1], rtol=1e-3, atol=0)


def test_repr(kind):
    assert '[-8, 7], symmetric, ch_axis=0' in repr(build(kind, QScheme(bit=4, is_per_channel=True)))


def test_data_are_not_read_into_python(kind, scheme, monkeypatch):
    """Converting a tensor to a number waits for the device."""

    def refuse(*args):
        raise AssertionError('a tensor was converted to a Python value')

    observer = build(kind, scheme)
    observer(torch.randn(6, 5, 4, 4))
    x = torch.randn(6, 5, 4, 4)
    with monkeypatch.context() as patch:
        for name in ('item', 'tolist', '__bool__', '__float__', '__int__', '__index__'):
            patch.setattr(torch.Tensor, name, refuse)
        observer(x)
        observer.running_qparams()


def test_large_batches_are_sampled_in_bounded_time(kind):
    """The range of a batch that is sampled is about that of all its values."""
    x = torch.randn(8, 3, 200, 200)
    for symmetric in (True, False):
        sampled, full = (
            build(
                kind,
                QScheme(bit=4, is_symmetry=symmetric),
                **({'max_samples': n} if issubclass(kind, HistogramBase) else {}),
            )
            for n in (2**15, None)
        )
        sampled(x)
        full(x)
        # The divergence of a Gaussian is flat around its minimum.
        rtol = 0.35 if kind is HistogramObserver else 0.1
        torch.testing.assert_close(sampled.calculate_qparams()[0], full.calculate_qparams()[0], rtol=rtol, atol=0)


WRONG = [
    (MinMaxObserver, 'eps', ['1e-3', True, None, 0, -1, float('nan'), float('inf')], 'positive numbers'),
    (MinMaxObserver, 'is_dynamic', [0, 'no', None], 'True, False'),
    (MinMaxObserver, 'is_pot_scale', [1, 'no', None], 'True, False'),
    (EMAMinMaxObserver, 'ema_ratio', ['0.9', False, None, 1, -0.1, float('nan')], '0 <= ema_ratio < 1'),
    (EMAPercentileObserver, 'ema_ratio', ['0.9', True, 1.5], '0 <= ema_ratio < 1'),
    (PercentileObserver, 'percentile', ['99', True, None, 0, 100.1, float('nan')], '0 < percentile <= 100'),
    (EMAPercentileObserver, 'percentile', ['99', True, None, 0, 100.1], '0 < percentile <= 100'),
    (MSEObserver, 'bins', ['100', 100.5, 100.0, True, None, 1], 'integers from 2 up'),
    (MSEObserver, 'max_samples', ['100', 100.5, True, 0], 'integers from 1 up'),
    (MSEObserver, 'p', ['2', True, None, 0, float('inf'), float('nan')], 'numbers from 0.1 up'),
    (MSEObserver, 'exact', ['False', 0, 1.0], 'True, False'),
    (EMAMSEObserver, 'p', ['2', True, None, 0.01], 'numbers from 0.1 up'),
    (EMAMSEObserver, 'exact', ['False', 0], 'True, False'),
    (HistogramObserver, 'objective', ['KL', None, ['kl']], "'kl', 'mse'"),
    (LSQPlusObserver, 'sigmas', ['3', True, None, 0, -3, float('inf')], 'positive numbers'),
    (FixedRangeObserver, 'function', ['relu', True, ['tanh']], "'sigmoid', 'softmax', 'tanh'"),
]


@pytest.mark.parametrize(
    'observer, field, given, allowed', [(*case[:2], value, case[3]) for case in WRONG for value in case[2]]
)
def test_a_wrong_argument_is_named_with_its_value_and_what_is_allowed(observer, field, given, allowed):
    with pytest.raises(ValueError) as error:
        observer(**{**SCHEMES['tensor-symmetric'].observer_params(), field: given})

    assert str(error.value) == f'{field}: got {given!r}, allowed: {allowed}'


def test_the_exponent_of_a_histogram_of_least_error():
    with pytest.raises(ValueError, match="p: got '2', allowed: numbers from 0.1 up"):
        HistogramObserver(objective='mse', p='2')


def test_numbers_of_numpy_and_limits_themselves_are_taken():
    assert EMAMinMaxObserver(ema_ratio=np.float32(0.5)).ema_ratio == 0.5
    assert EMAMinMaxObserver(ema_ratio=0).ema_ratio == 0
    assert MSEObserver(bins=np.int64(2), max_samples=1).bins == 2
    assert PercentileObserver(percentile=100).percentile == 100
