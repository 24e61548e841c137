"""A fake quantizer restored from a state dict is the one that was saved."""

from __future__ import annotations

import io

import hypothesis.strategies as st
import torch
from hypothesis import given, settings
from random_schemes import magnitudes, schemes, seeds

from mmrazor_quant.fake_quants import (
    DoReFaFakeQuantize,
    DSQFakeQuantize,
    FakeQuantize,
    LearnedFakeQuantize,
    LSQFakeQuantize,
    LSQPlusFakeQuantize,
    PACTFakeQuantize,
    TQTFakeQuantize,
)
from mmrazor_quant.observers import EMAMinMaxObserver, LSQObserver, LSQPlusObserver, MinMaxObserver

KINDS = [FakeQuantize, LSQFakeQuantize, LSQPlusFakeQuantize, PACTFakeQuantize, DSQFakeQuantize, TQTFakeQuantize]
KINDS += [DoReFaFakeQuantize]
OBSERVERS = [MinMaxObserver, EMAMinMaxObserver, LSQObserver, LSQPlusObserver]


@st.composite
def quantizers(draw):
    """A calibrated fake quantizer, a function that makes one as it was when it was built, and new data."""
    kind, observer = draw(st.sampled_from(KINDS)), draw(st.sampled_from(OBSERVERS))
    scheme = draw(schemes(ch_axis=1, **({'is_symmetry': True} if kind is TQTFakeQuantize else {})))
    generator, magnitude = torch.Generator().manual_seed(draw(seeds)), draw(magnitudes)
    center = draw(st.floats(-2, 2))

    def make() -> FakeQuantize:
        return kind(observer, **scheme.observer_params())

    def data() -> torch.Tensor:
        return (torch.randn(6, 3, 4, generator=generator) + center) * magnitude

    quantizer = make()
    quantizer.enable_fake_quant(False)
    quantizer(data())
    quantizer(data())
    quantizer.compute_qparams()
    quantizer.enable_fake_quant(True)
    quantizer.enable_observer(draw(st.booleans()))
    if isinstance(quantizer, LearnedFakeQuantize):
        # As training leaves it: the parameters do not follow from the statistics any more.
        with torch.no_grad():
            for parameter in quantizer.learned_parameters():
                parameter.mul_(draw(st.floats(0.7, 1.4)))
    return quantizer, make, data()


@given(quantizers())
@settings(max_examples=150, deadline=None, derandomize=True)
def test_saved_and_loaded_it_gives_the_same(case):
    quantizer, make, x = case
    saved = io.BytesIO()
    torch.save(quantizer.state_dict(), saved)
    saved.seek(0)

    restored = make()
    restored.load_state_dict(torch.load(saved))

    same_state(quantizer, restored)
    assert torch.equal(restored(x), quantizer(x))
    same_state(quantizer, restored)


def same_state(one, other):
    """Compare also what a forward has changed: scales that follow the data, statistics."""
    states = one.state_dict(), other.state_dict()
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        assert value.dtype == states[1][name].dtype and torch.equal(value, states[1][name]), name
