"""Min-max ranges and their averages."""

from __future__ import annotations

import pytest
import torch

from mmrazor_quant.observers import EMAMinMaxObserver, EMAMSEObserver, MinMaxObserver
from mmrazor_quant.qscheme import QScheme

SCHEME = QScheme(is_symmetry=False)


def batches():
    return [torch.randn(4, 3, 5) + i for i in range(5)]


@pytest.mark.parametrize('ch_axis', [-1, 0, 1, 2])
def test_range_of_all_batches(ch_axis):
    scheme = QScheme(is_symmetry=False, is_per_channel=ch_axis >= 0, ch_axis=max(ch_axis, 0))
    observer = MinMaxObserver(**scheme.observer_params())
    seen = batches()
    for x in seen:
        observer(x)
    everything = torch.stack(seen)
    rows = everything.reshape(1, -1) if ch_axis < 0 else everything.movedim(ch_axis + 1, 0).flatten(1)
    low, high = observer.observed_range()
    assert torch.equal(low, rows.amin(1)) and torch.equal(high, rows.amax(1))


def test_moving_average_starts_from_the_first_batch():
    observer = EMAMinMaxObserver(**SCHEME.observer_params(), ema_ratio=0.75)
    low = high = None
    for x in batches():
        observer(x)
        low = x.min() if low is None else 0.75 * low + 0.25 * x.min()
        high = x.max() if high is None else 0.75 * high + 0.25 * x.max()
        torch.testing.assert_close(observer.min_val, low.reshape(1))
        torch.testing.assert_close(observer.max_val, high.reshape(1))


def test_default_average():
    assert EMAMinMaxObserver(**SCHEME.observer_params()).ema_ratio == 0.9


def test_average_without_a_past_is_the_last_batch():
    observer = EMAMinMaxObserver(**SCHEME.observer_params(), ema_ratio=0.0)
    with pytest.raises(ValueError, match='no data were observed'):
        observer.calculate_qparams()
    for batch in (torch.tensor([-3.0, 5.0]), torch.tensor([-1.0, 2.0])):
        observer(batch)
        assert [end.item() for end in observer.observed_range()] == batch.tolist()
    observer.calculate_qparams()


@pytest.mark.parametrize('kind', [EMAMinMaxObserver, EMAMSEObserver])
@pytest.mark.parametrize('ratio', [1.0, -0.1, 2])
def test_refused_averages(kind, ratio):
    with pytest.raises(ValueError, match='ema_ratio'):
        kind(**SCHEME.observer_params(), ema_ratio=ratio)


def test_data_are_not_read_into_python(monkeypatch):
    """Converting a tensor to a number waits for the device."""
    observers = [kind(**SCHEME.observer_params()) for kind in (MinMaxObserver, EMAMinMaxObserver)]

    def refuse(*args):
        raise AssertionError('a tensor was converted to a Python value')

    x = torch.randn(100)
    with monkeypatch.context() as patch:
        for name in ('item', 'tolist', '__bool__', '__float__', '__int__'):
            patch.setattr(torch.Tensor, name, refuse)
        for observer in observers:
            observer(x)
            observer.running_qparams()
