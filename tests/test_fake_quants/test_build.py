"""Building from configs."""

from __future__ import annotations

import pytest
import torch
from torch.ao.quantization import FakeQuantize as TorchFakeQuantize
from torch.ao.quantization import MinMaxObserver as TorchMinMaxObserver

from mmrazor_quant.fake_quants import FakeQuantize, build_fake_quant
from mmrazor_quant.observers import MinMaxObserver, MSEObserver
from mmrazor_quant.qscheme import QScheme

FAKE_QUANT = {'type': 'mmrazor.FakeQuantize'}


def test_names_classes_and_arguments():
    scheme = QScheme(bit=4, is_per_channel=True, ch_axis=1, is_pot_scale=True)
    quantizer = build_fake_quant(FAKE_QUANT, {'type': 'MSEObserver', 'p': 2.4}, scheme, 'qconfig.w')
    assert type(quantizer) is FakeQuantize and (quantizer.quant_min, quantizer.quant_max) == (-8, 7)
    observer = quantizer.activation_post_process
    assert type(observer) is MSEObserver and observer.p == 2.4
    assert observer.ch_axis == quantizer.ch_axis == 1 and observer.is_pot_scale
    assert type(build_fake_quant({'type': FakeQuantize}, {'type': MinMaxObserver}, scheme, 'w')) is FakeQuantize


def test_configs_are_left_as_they_were():
    observer = {'type': 'mmrazor.MSEObserver', 'p': 2.4}
    build_fake_quant(FAKE_QUANT, observer, QScheme(), 'qconfig.w')
    assert observer == {'type': 'mmrazor.MSEObserver', 'p': 2.4} and FAKE_QUANT == {'type': 'mmrazor.FakeQuantize'}


@pytest.mark.parametrize('fake_quant', [FakeQuantize, TorchFakeQuantize])
@pytest.mark.parametrize('observer', [MinMaxObserver, TorchMinMaxObserver])
def test_torch_and_own_classes_combine(fake_quant, observer):
    scheme = QScheme(bit=4, is_symmetry=False)
    quantizer = build_fake_quant({'type': fake_quant}, {'type': observer}, scheme, 'qconfig.a')
    x = torch.randn(100)
    assert (quantizer(x) - x).abs().max() <= (x.max() - x.min()) / 15 * 0.51


@pytest.mark.parametrize(
    'fake_quant, observer, words',
    [
        ({'type': 'Nope'}, {'type': 'MinMaxObserver'}, ['qconfig.w_fake_quant.type', "'Nope'", 'FakeQuantize']),
        (FAKE_QUANT, {'type': 'Nope'}, ['qconfig.w_observer.type', "'Nope'", 'MSEObserver']),
        (FAKE_QUANT, {}, ['qconfig.w_observer', 'type']),
        (FAKE_QUANT, {'type': 'FakeQuantize'}, ['qconfig.w_observer.type', 'FakeQuantize', 'MSEObserver']),
        (FAKE_QUANT, {'type': 'MSEObserver', 'q': 3}, ['qconfig.w', 'MSEObserver', "'q'"]),
        (FAKE_QUANT, {'type': 'MSEObserver', 'p': -3}, ['qconfig.w_observer.p: got -3, allowed: numbers from 0.1']),
        ({'type': 'LSQFakeQuantize', 'scale_grad': 1}, {'type': 'MinMaxObserver'},
         ['qconfig.w_fake_quant.scale_grad: got 1, allowed: True, False']),
        ({'type': 'DoReFaFakeQuantize', 'rescale': 'no'}, {'type': 'MinMaxObserver'},
         ["qconfig.w_fake_quant.rescale: got 'no', allowed: True, False"]),
        ({'type': 'DSQFakeQuantize', 'alpha': '0.2'}, {'type': 'MinMaxObserver'},
         ["qconfig.w_fake_quant.alpha: got '0.2', allowed: numbers in [0.001, 0.999]"]),
        ({'type': 'DSQFakeQuantize', 'alpha': True}, {'type': 'MinMaxObserver'}, ['fake_quant.alpha: got True']),
        ({'type': 'DynamicFakeQuantize', 'share': ['token']}, {'type': 'MinMaxObserver'},
         ["qconfig.w_fake_quant.share: got ['token'], allowed: 'tensor', 'sample', 'token'"]),
        ({'type': 5}, {'type': 'MinMaxObserver'}, ['qconfig.w_fake_quant.type: got 5, allowed: the name of a class']),
        (FAKE_QUANT, {'type': ['MinMaxObserver']}, ["qconfig.w_observer.type: got ['MinMaxObserver'], allowed:"]),
        (FAKE_QUANT, {'type': 'MinMaxObserver', 'quant_min': 0}, ['qconfig.w', 'quant_min']),
        (FAKE_QUANT, {'type': TorchMinMaxObserver, 'is_pot_scale': True}, ['qconfig.w', 'is_pot_scale']),
    ],
)  # fmt: skip
def test_refusals_name_field_value_and_what_is_allowed(fake_quant, observer, words):
    with pytest.raises((ValueError, TypeError)) as error:
        build_fake_quant(fake_quant, observer, QScheme(), 'qconfig.w')
    for word in words:
        assert word in str(error.value)
