"""Weights of learned rounding, and activations of which some are dropped, as modules."""

from __future__ import annotations

import pytest
import torch

from mmrazor_quant.fake_quants import AdaRoundFakeQuantize, FakeQuantize, LSQFakeQuantize, QDropFakeQuantize
from mmrazor_quant.observers import MinMaxObserver
from mmrazor_quant.qscheme import QScheme


def make(kind: type, bit: int = 4, **scheme) -> FakeQuantize:
    """A quantizer of asymmetric integers."""
    return kind(observer=MinMaxObserver, **QScheme(bit=bit, is_symmetry=False, **scheme).observer_params())


def calibrated(kind: type, x: torch.Tensor, **kwargs) -> FakeQuantize:
    """A quantizer with the qparams of a tensor, switched to quantizing only."""
    quantizer = make(kind, **kwargs)
    quantizer.activation_post_process(x)
    quantizer.compute_qparams()
    quantizer.enable_observer(False)
    quantizer.enable_fake_quant(True)
    return quantizer


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.randn(5, 3, 2, 2, generator=torch.Generator().manual_seed(0))


def test_without_learned_integers_weights_are_rounded_to_nearest(weight):
    learned, plain = (
        calibrated(kind, weight, is_per_channel=True, ch_axis=0) for kind in (AdaRoundFakeQuantize, FakeQuantize)
    )

    assert torch.equal(learned(weight), plain(weight))


def test_learned_integers_are_the_weights(weight):
    quantizer = calibrated(AdaRoundFakeQuantize, weight, is_per_channel=True, ch_axis=0)
    integers = torch.randint(0, 16, weight.shape)

    quantizer.set_integers(integers)

    shape = (5, 1, 1, 1)
    expected = (integers - quantizer.zero_point.reshape(shape)) * quantizer.scale.reshape(shape)
    assert torch.equal(quantizer(weight), expected)
    assert torch.equal(quantizer(2 * weight), expected)
    assert quantizer.integers.dtype == torch.int8
    quantizer.enable_fake_quant(False)
    assert torch.equal(quantizer(weight), weight)


@pytest.mark.parametrize(('bit', 'dtype'), [(1, torch.int8), (7, torch.int8), (8, torch.uint8), (12, torch.int16)])
def test_integers_are_kept_in_the_smallest_type(bit, dtype):
    quantizer = make(AdaRoundFakeQuantize, bit=bit)

    quantizer.set_integers(torch.tensor([quantizer.quant_min, quantizer.quant_max]))

    assert quantizer.integers.dtype == dtype
    assert quantizer.integers.tolist() == [quantizer.quant_min, quantizer.quant_max]


def test_integers_are_where_the_scale_is(weight):
    quantizer = calibrated(AdaRoundFakeQuantize, weight).to('meta')

    quantizer.set_integers(torch.zeros(weight.shape))

    assert quantizer.integers.device.type == 'meta' and quantizer(weight.to('meta')).shape == weight.shape


def test_the_state_dict_has_the_integers_or_none(weight):
    saved = calibrated(AdaRoundFakeQuantize, weight, is_per_channel=True, ch_axis=0)
    empty = saved.state_dict()
    saved.set_integers(torch.randint(0, 16, weight.shape))
    fresh = make(AdaRoundFakeQuantize, is_per_channel=True, ch_axis=0)

    fresh.load_state_dict(saved.state_dict())
    assert torch.equal(fresh(weight), saved(weight)) and fresh.is_learned

    fresh.load_state_dict(empty)
    assert not fresh.is_learned


def test_a_weight_of_another_shape_is_refused(weight):
    quantizer = calibrated(AdaRoundFakeQuantize, weight)
    quantizer.set_integers(torch.zeros(5, 3, 1, 1))

    with pytest.raises(ValueError, match=r'\(5, 3, 1, 1\), but the weight \(5, 3, 2, 2\)'):
        quantizer(weight)


def test_new_qparams_forget_the_integers(weight):
    quantizer = calibrated(AdaRoundFakeQuantize, weight)
    quantizer.set_integers(torch.zeros(weight.shape))

    quantizer.compute_qparams()

    assert not quantizer.is_learned


def test_qdrop_is_lsq_unless_something_is_kept():
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    dropped, plain = (calibrated(kind, x) for kind in (QDropFakeQuantize, LSQFakeQuantize))
    kept = torch.rand(x.shape, generator=torch.Generator().manual_seed(2)) < 0.5

    assert torch.equal(dropped(x), plain(x))
    dropped.drop_by(lambda _: kept)
    assert torch.equal(dropped(x), torch.where(kept, x, plain(x)))
    dropped.drop_by(None)
    assert torch.equal(dropped(x), plain(x))
