"""Starting from a quantized checkpoint that was made with another qconfig, or with other fake quantizers."""

from __future__ import annotations

import pytest
import torch
from mmengine.device import get_device

PTQ = {'w_qscheme': {'bit': 8}, 'a_qscheme': {'bit': 8, 'is_symmetry': False}}
LSQ = {'w_fake_quant': {'type': 'mmrazor.LSQFakeQuantize'}, 'a_fake_quant': {'type': 'mmrazor.LSQPlusFakeQuantize'}}
STILL = {'optim_wrapper': {'optimizer': {'type': 'SGD', 'lr': 0.0}}, 'train_cfg__max_epochs': 1}
"""Training that changes nothing: what is there at its end is what it began with."""


@pytest.fixture
def make(make_runner, tmp_path):
    """Build a runner with a qconfig, in a folder of its own."""

    def run(name: str, qconfig: dict, **changes):
        quantizer = {'type': 'mmrazor.CustomQuantizer', 'qconfig': qconfig}
        return make_runner(work_dir=tmp_path / name, model__quantizer=quantizer, **changes)

    return run


@pytest.fixture
def checkpoint(make, tmp_path) -> str:
    make('ptq', PTQ).test()
    return str(tmp_path / 'ptq' / 'quantized.pth')


def scales(model) -> dict[str, torch.Tensor]:
    quantizers = (*model.weight_quantizers(), *model.act_quantizers())
    return {path: quantizer.scale.detach().clone() for path, quantizer in quantizers}


def saved_scales(checkpoint: str) -> dict[str, torch.Tensor]:
    state = torch.load(checkpoint, weights_only=True, map_location=get_device())['state_dict']
    return {key.removesuffix('.scale'): value for key, value in state.items() if key.endswith('fake_quant.scale')}


def test_training_begins_with_the_ranges_of_the_same_scheme(make, checkpoint, log):
    runner = make('qat', PTQ, load_from=checkpoint, **STILL, train_cfg__observe_end=0)
    lines = log(runner)
    runner.train()

    assert any('calibrated already' in line for line in lines)
    found, saved = scales(runner.model), saved_scales(checkpoint)
    assert found.keys() == saved.keys()
    assert all(torch.equal(found[path], saved[path]) for path in found)


def test_learned_parameters_start_from_the_ranges_of_plain_quantizers(make, checkpoint):
    runner = make('lsq', {**PTQ, **LSQ}, load_from=checkpoint, **STILL, train_cfg__observe_end=0)
    runner.train()

    saved = torch.load(checkpoint, weights_only=True, map_location=get_device())['state_dict']
    for path, quantizer in runner.model.act_quantizers():
        scale, zero_point = saved[f'{path}.scale'], saved[f'{path}.zero_point']
        assert quantizer.is_initialized
        torch.testing.assert_close(quantizer.scale.detach(), scale)
        torch.testing.assert_close(quantizer.offset.detach(), -zero_point * scale, rtol=1e-4, atol=1e-4)
    assert all(quantizer.is_initialized for _, quantizer in runner.model.weight_quantizers())


OTHERS = {
    'fewer bits': ({**PTQ, 'w_qscheme': {'bit': 2}}, 'quant_min'),
    'powers of two': ({**PTQ, 'a_qscheme': {'bit': 8, 'is_symmetry': False, 'is_pot_scale': True}}, 'is_pot_scale'),
    'per tensor': ({**PTQ, 'w_qscheme': {'bit': 8, 'is_per_channel': False}}, 'ch_axis'),
    'learned, with fewer bits': ({**LSQ, 'w_qscheme': {'bit': 2}, 'a_qscheme': {'bit': 4}}, 'quant_min'),
    'more quantizers': (PTQ, 'not in the checkpoint'),
}


@pytest.mark.parametrize('name', OTHERS)
def test_training_calibrates_anew_for_another_scheme(make, checkpoint, log, name, tmp_path):
    qconfig, reason = OTHERS[name]
    schedule = {**STILL, 'train_cfg__observe_end': 0, 'train_cfg__calibrate_steps': 2}
    state = torch.load(checkpoint, weights_only=True)
    entries = state['state_dict']
    weights = {key: value for key, value in entries.items() if '_fake_quant.' not in key and key != 'quant_calibrated'}
    torch.save({**state, 'state_dict': weights}, tmp_path / 'float.pth')
    if name == 'more quantizers':
        entries = {key: value for key, value in entries.items() if not key.startswith('head.input_fake_quant.')}
        torch.save({**state, 'state_dict': entries}, checkpoint)
    expected = make('float', qconfig, load_from=str(tmp_path / 'float.pth'), **schedule)
    expected.train()

    runner = make('qat', qconfig, load_from=checkpoint, **schedule)
    lines = log(runner)
    runner.train()

    assert any('calibrated anew' in line and reason in line for line in lines)
    found = scales(runner.model)
    assert all(torch.equal(found[path], scale) for path, scale in scales(expected.model).items())
    assert runner.model.is_calibrated and all((scale != 1).all() for scale in found.values())


def test_evaluation_calibrates_anew_for_another_scheme(make, checkpoint, log):
    runner = make('test', OTHERS['fewer bits'][0], load_from=checkpoint)
    lines = log(runner)
    metrics = runner.test()

    assert any('calibrated anew' in line for line in lines)
    assert 'float/toy/accuracy' in metrics


def test_a_learned_checkpoint_of_other_bits_is_noticed(make, tmp_path):
    eight, four = (
        {**LSQ, 'w_qscheme': {'bit': bit}, 'a_qscheme': {'bit': bit, 'is_symmetry': False}} for bit in (8, 4)
    )
    make('eight', eight, **STILL).train()
    runner = make('four', four, load_from=str(tmp_path / 'eight' / 'epoch_1.pth'), **STILL)
    runner.load_or_resume()

    assert not runner.model.is_calibrated
    assert set(runner.model.unmatched) == set(scales(runner.model))


def test_resuming_with_another_scheme_is_refused(make, tmp_path):
    make('qat', PTQ, **STILL).train()
    other = {**PTQ, 'w_qscheme': {'bit': 4}}
    runner = make('qat', other, load_from=str(tmp_path / 'qat' / 'epoch_1.pth'), resume=True,
                  optim_wrapper=STILL['optim_wrapper'])  # fmt: skip

    with pytest.raises(ValueError, match=r'resume: .*another quantizer\.qconfig.*quant_m.* -128 .*, -8 in the config'):
        runner.train()


def test_a_checkpoint_of_before_schemes_were_recorded_is_taken_over(make, checkpoint, tmp_path):
    state = torch.load(checkpoint, weights_only=True)
    state['state_dict'] = {key: value for key, value in state['state_dict'].items() if not key.endswith('.scheme')}
    torch.save(state, tmp_path / 'old.pth')
    runner = make('old', PTQ, load_from=str(tmp_path / 'old.pth'))
    runner.load_or_resume()

    assert runner.model.is_calibrated and not runner.model.unmatched
    found, saved = scales(runner.model), saved_scales(checkpoint)
    assert found.keys() == saved.keys()
    assert all(torch.equal(found[path], saved[path]) for path in found)
