"""Ranges known beforehand."""

from __future__ import annotations

import pytest
import torch

from mmrazor_quant.observers import FixedRangeObserver
from mmrazor_quant.qscheme import QScheme

SCHEME = QScheme(is_symmetry=False)


def ends(observer):
    return [v.tolist() for v in observer.observed_range()]


@pytest.mark.parametrize('function, low, high', [('sigmoid', 0, 1), ('softmax', 0, 1), ('tanh', -1, 1)])
def test_functions(function, low, high):
    observer = FixedRangeObserver(**SCHEME.observer_params(), function=function)
    scale, zero_point = observer.calculate_qparams()
    assert scale.item() == pytest.approx((high - low) / 255)
    assert zero_point.item() in {0: (0,), -1: (127, 128)}[low]
    assert ends(observer) == [[low], [high]]


def test_data_change_nothing():
    observer = FixedRangeObserver(**SCHEME.observer_params(), min_val=-0.5, max_val=6)
    for x in (torch.randn(100) * 50, torch.full((3,), float('nan')), torch.empty(0)):
        assert observer(x) is x
        assert ends(observer) == [[-0.5], [6]]
    observer.calculate_qparams()
    observer.reset()
    assert ends(observer) == [[-0.5], [6]]


def test_per_channel():
    observer = FixedRangeObserver(**QScheme(is_per_channel=True, ch_axis=1).observer_params(), function='tanh')
    observer(torch.randn(2, 3, 4))
    assert ends(observer) == [[-1] * 3, [1] * 3]
    observer.reset()
    assert ends(observer) == [[-1] * 3, [1] * 3]
    other = FixedRangeObserver(**QScheme(is_per_channel=True).observer_params(), function='tanh')
    other.set_channels(2)
    assert ends(other) == [[-1] * 2, [1] * 2]
    other.set_channels(1)
    other.load_state_dict(observer.state_dict())
    assert ends(other) == [[-1] * 3, [1] * 3]


@pytest.mark.parametrize(
    'arguments, message',
    [
        ({}, 'min_val: got None, allowed: finite numbers, or a function'),
        ({'min_val': 0}, 'max_val: got None'),
        ({'max_val': 1.0}, 'min_val: got None'),
        ({'min_val': 2, 'max_val': 1}, 'min_val: got 2, allowed: numbers up to max_val, which is 1'),
        ({'min_val': 0, 'max_val': float('inf')}, 'max_val: got inf'),
        ({'min_val': float('nan'), 'max_val': 1}, 'min_val: got nan'),
        ({'min_val': '0', 'max_val': 1}, "min_val: got '0'"),
        ({'min_val': 0, 'max_val': True}, 'max_val: got True'),
        ({'function': 'relu'}, "function: got 'relu', allowed: 'sigmoid', 'softmax', 'tanh'"),
        ({'function': 'tanh', 'max_val': 1}, "max_val: got 1 with function='tanh', allowed: only one"),
    ],
)
def test_refused_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        FixedRangeObserver(**SCHEME.observer_params(), **arguments)
