"""Bits, symmetry and granularity become integer ranges; anything else is refused by name."""

from __future__ import annotations

import pytest
import torch

from mmrazor_quant.qscheme import QScheme


@pytest.mark.parametrize(
    'fields, low, high, dtype',
    [
        ({}, -128, 127, torch.qint8),
        ({'bit': 4}, -8, 7, torch.qint8),
        ({'bit': 8, 'is_symmetric_range': True}, -127, 127, torch.qint8),
        ({'bit': 2, 'is_symmetric_range': True}, -1, 1, torch.qint8),
        ({'bit': 1}, -1, 0, torch.qint8),
        ({'bit': 1, 'is_symmetry': False}, 0, 1, torch.quint8),
        ({'bit': 8, 'is_symmetry': False}, 0, 255, torch.quint8),
        ({'bit': 8, 'is_signed': False}, 0, 255, torch.quint8),
        ({'bit': 8, 'is_symmetry': False, 'is_signed': True}, -128, 127, torch.qint8),
        ({'bit': 9}, -256, 255, torch.qint32),
        ({'bit': 16, 'is_symmetry': False}, 0, 65535, torch.qint32),
        ({'bit': 32}, -(2**31), 2**31 - 1, torch.qint32),
        ({'bit': 32, 'is_symmetry': False}, 0, 2**32 - 1, torch.qint32),
    ],
)
def test_ranges(fields, low, high, dtype):
    scheme = QScheme(**fields)
    assert (scheme.quant_min, scheme.quant_max, scheme.dtype) == (low, high, dtype)


@pytest.mark.parametrize('bit', range(1, 33))
@pytest.mark.parametrize('is_symmetry', [True, False])
def test_every_scheme_has_all_levels_and_zero(bit, is_symmetry):
    scheme = QScheme(bit=bit, is_symmetry=is_symmetry)
    assert scheme.quant_max - scheme.quant_min == 2**bit - 1
    assert scheme.quant_min <= 0 <= scheme.quant_max


@pytest.mark.parametrize(
    'per_channel, symmetric, expected',
    [
        (True, True, torch.per_channel_symmetric),
        (True, False, torch.per_channel_affine),
        (False, True, torch.per_tensor_symmetric),
        (False, False, torch.per_tensor_affine),
    ],
)
def test_torch_qscheme(per_channel, symmetric, expected):
    assert QScheme(is_per_channel=per_channel, is_symmetry=symmetric).torch_qscheme == expected


def test_observer_params():
    params = QScheme(bit=4, is_per_channel=True, ch_axis=1, is_pot_scale=True).observer_params()
    assert params == {
        'dtype': torch.qint8,
        'qscheme': torch.per_channel_symmetric,
        'quant_min': -8,
        'quant_max': 7,
        'ch_axis': 1,
        'is_pot_scale': True,
    }
    assert QScheme(ch_axis=1).observer_params()['ch_axis'] == -1


def test_from_cfg_takes_defaults_for_what_is_left_out():
    assert QScheme.from_cfg({'bit': 4, 'is_symmetry': False}, 'qconfig.a_qscheme') == QScheme(bit=4, is_symmetry=False)


@pytest.mark.parametrize(
    'cfg, words',
    [
        ({'bit': 0}, ['qconfig.w_qscheme.bit', '0', '1 to 32']),
        ({'bit': 33}, ['qconfig.w_qscheme.bit', '33', '1 to 32']),
        ({'bit': 8.0}, ['qconfig.w_qscheme.bit', '8.0', '1 to 32']),
        ({'bit': True}, ['qconfig.w_qscheme.bit', 'True', '1 to 32']),
        ({'bit': '8'}, ['qconfig.w_qscheme.bit', "'8'", '1 to 32']),
        ({'is_symmetry': 1}, ['qconfig.w_qscheme.is_symmetry', '1', 'True, False']),
        ({'is_per_channel': None}, ['qconfig.w_qscheme.is_per_channel', 'None', 'True, False']),
        ({'is_signed': 'no'}, ['qconfig.w_qscheme.is_signed', "'no'", 'True, False, None']),
        ({'ch_axis': -1}, ['qconfig.w_qscheme.ch_axis', '-1', 'from 0 up']),
        ({'bit': 1, 'is_symmetric_range': True}, ['qconfig.w_qscheme.is_symmetric_range', 'one level']),
        ({'is_signed': False, 'is_symmetric_range': True}, ['qconfig.w_qscheme.is_symmetric_range', 'signed']),
        ({'bits': 8}, ['qconfig.w_qscheme.bits', 'unknown', 'bit, is_symmetry']),
        ('8bit', ['qconfig.w_qscheme', "'8bit'", 'dict']),
    ],
)
def test_refusals_name_field_value_and_what_is_allowed(cfg, words):
    with pytest.raises(ValueError) as error:
        QScheme.from_cfg(cfg, 'qconfig.w_qscheme')
    for word in words:
        assert word in str(error.value)


def test_constructor_checks_too():
    with pytest.raises(ValueError, match='bit: got 40'):
        QScheme(bit=40)
