"""The QAT schedule is a pure function that refuses what cannot be meant."""

from __future__ import annotations

import pytest

from mmrazor_quant.engine.schedule import QATSchedule


def switches(schedule: QATSchedule, name: str, steps: int = 6) -> list[bool]:
    return [getattr(schedule.state_at(step), name) for step in range(steps)]


def test_default_has_everything_on_from_the_start():
    for name, expected in [('observe', True), ('weight_quant', True), ('act_quant', True), ('bn_frozen', False)]:
        assert switches(QATSchedule(), name) == [expected] * 6


def test_each_switch_flips_at_its_step():
    schedule = QATSchedule(observe_begin=1, observe_end=4, weight_quant_begin=2, act_quant_begin=3, freeze_bn_begin=5)
    assert switches(schedule, 'observe') == [False, True, True, True, False, False]
    assert switches(schedule, 'weight_quant') == [False, False, True, True, True, True]
    assert switches(schedule, 'act_quant') == [False, False, False, True, True, True]
    assert switches(schedule, 'bn_frozen') == [False] * 5 + [True]


@pytest.mark.parametrize(
    'field, value',
    [
        ('observe_begin', -1),
        ('observe_end', -2),
        ('weight_quant_begin', -1),
        ('act_quant_begin', -3),
        ('freeze_bn_begin', -2),
        ('act_quant_begin', 1.5),
        ('observe_begin', True),
        ('observe_end', '3'),
    ],
)
def test_wrong_value_is_refused_by_name(field, value):
    with pytest.raises(ValueError, match=rf'train_cfg\.{field} must be .* but got {value!r}'):
        QATSchedule(**{field: value}).check(10, 'epochs', 'train_cfg')


@pytest.mark.parametrize('field', ['observe_begin', 'weight_quant_begin', 'act_quant_begin'])
def test_a_begin_after_the_end_of_training_is_refused(field):
    with pytest.raises(ValueError, match=rf'train_cfg\.{field}=10 is never reached.*10 epochs'):
        QATSchedule(**{field: 10}).check(10, 'epochs', 'train_cfg')
    QATSchedule(**{field: 9}).check(10, 'epochs', 'train_cfg')


def test_observing_must_not_end_before_it_begins():
    with pytest.raises(ValueError, match=r'observe_end=2 is before train_cfg\.observe_begin=3'):
        QATSchedule(observe_begin=3, observe_end=2).check(10, 'epochs', 'train_cfg')


@pytest.mark.parametrize(
    'schedule, needs',
    [
        (QATSchedule(), False),
        (QATSchedule(observe_begin=2, act_quant_begin=2), False),
        (QATSchedule(observe_begin=3, act_quant_begin=2), True),
        (QATSchedule(observe_begin=0, observe_end=0), True),
        (QATSchedule(observe_end=1, act_quant_begin=4), False),
    ],
)
def test_needs_calibration(schedule, needs):
    assert schedule.needs_calibration() is needs
