"""What settings say of each iteration."""

import pytest

from mmrazor_quant.reconstruction.settings import Settings


def test_defaults_follow_the_number_of_iterations():
    assert [Settings(iters=n).mirror for n in (300, 301)] == [False, True]
    assert Settings(iters=10, mirror=True).mirror
    assert Settings(iters=100).lr == Settings(iters=300).lr == 3e-2
    assert Settings(iters=1200).lr == pytest.approx(1.5e-2)
    assert Settings(iters=1200, lr=3e-2).lr == 3e-2


def test_schedule_ends_hard_and_at_rest():
    settings = Settings(iters=50, lr_end=0.1, drop_prob=0.5, drop_end=0.0)
    first, last = settings.schedule(0), settings.schedule(49)
    assert first.hardness == first.regularization == 0.0
    assert last.hardness == 1.0
    assert last.regularization == settings.regularization
    assert last.rate == pytest.approx(0.1 * settings.lr)
    assert last.act_rate == pytest.approx(0.0)
    assert (first.power, last.power) == settings.powers
    assert last.drop == pytest.approx(0.0)
    assert first.drop == pytest.approx(0.49)
