"""State dicts that were saved of a model with other quantizers than that they are loaded into."""

from __future__ import annotations

import copy

import pytest
import torch
from small_models import calibrate, images, quantized
from torch import nn
from torch.ao.quantization import FakeQuantize as TorchFakeQuantize

LSQ = dict(w_fake_quant=dict(type='mmrazor.LSQFakeQuantize'), a_fake_quant=dict(type='mmrazor.LSQFakeQuantize'))
POWERS = dict(w_qscheme=dict(is_pot_scale=True), a_qscheme=dict(is_pot_scale=True, is_symmetry=True))
DYNAMIC = dict(a_fake_quant=dict(type='mmrazor.DynamicFakeQuantize', share='sample'))
DSQ = dict(a_fake_quant=dict(type='mmrazor.DSQFakeQuantize'))
TORCH = dict(type=TorchFakeQuantize)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 3))


def model(**qconfig):
    return quantized(network(), qconfig).eval()


def state(**qconfig) -> dict[str, torch.Tensor]:
    return copy.deepcopy(calibrate(model(**qconfig)).state_dict())


OTHERS = {
    'none of its quantizers': (dict(a_qscheme='float'), dict(w_qscheme='float'), 'not in the checkpoint'),
    'dynamic ones': (DYNAMIC, {}, 'is_dynamic 1 in the checkpoint, 0 in the config'),
    'learned powers of two': ({**POWERS, **LSQ}, POWERS, 'of another fake quantizer'),
    'learned offsets': (
        dict(a_fake_quant=dict(type='mmrazor.LSQPlusFakeQuantize')), LSQ, 'of another fake quantizer'),
    'another way of learning': (
        DSQ, dict(a_fake_quant=dict(type='mmrazor.PACTFakeQuantize')), 'of another fake quantizer'),
}  # fmt: skip


@pytest.mark.parametrize('name', OTHERS)
def test_a_model_is_not_calibrated_by_the_state_of(name):
    saved, wanted, reason = OTHERS[name]
    loaded = model(**wanted)
    loaded.load_state_dict(state(**saved), strict=False)

    assert not loaded.is_calibrated
    assert loaded.unmatched and all(reason in each for each in loaded.unmatched.values())
    calibrate(loaded)
    expected = calibrate(model(**wanted))
    x = images(seed=1)
    assert loaded.is_calibrated and torch.equal(loaded(x), expected(x))


@pytest.mark.parametrize('name', ['all', 'activations', 'weights'])
def test_a_float_state_loads_whatever_the_quantizers(name):
    kinds = dict(w_fake_quant=TORCH, a_fake_quant=TORCH)
    wanted = {key: kind for key, kind in kinds.items() if name in ('all', {'w': 'weights', 'a': 'activations'}[key[0]])}
    loaded = model(**wanted)
    loaded.load_state_dict(network().state_dict())

    assert not loaded.is_calibrated and not loaded.unmatched


def test_learned_quantizers_without_start_values_stay_so():
    """Those of a branch that was not reached before the checkpoint was written."""
    first = model(**LSQ)
    first.observe_weights()
    first.mark_calibrated()
    loaded = model(**LSQ)
    loaded.load_state_dict(first.state_dict())

    assert loaded.is_calibrated
    assert [quantizer.is_initialized for _, quantizer in loaded.weight_quantizers()] == [True, True]
    assert [quantizer.is_initialized for _, quantizer in loaded.act_quantizers()] == [False, False]


@pytest.mark.parametrize('kind', ['LSQ', 'LSQPlus', 'PACT', 'DSQ'])
def test_learned_quantizers_start_from_the_state_of_plain_ones(kind):
    saved, loaded = calibrate(model()), model(a_fake_quant=dict(type=f'mmrazor.{kind}FakeQuantize'))
    result = loaded.load_state_dict(copy.deepcopy(saved.state_dict()), strict=False)

    assert loaded.is_calibrated and not result.missing_keys
    assert all(quantizer.is_initialized for _, quantizer in loaded.act_quantizers())
    loaded.set_quant_state(False, True, False, True)
    x = images(seed=1)
    # DSQ's steps are soft.
    torch.testing.assert_close(loaded.eval()(x), saved(x), rtol=0, atol=2e-2 if kind == 'DSQ' else 1e-5)
