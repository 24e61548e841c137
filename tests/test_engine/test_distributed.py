"""On two ranks, the model that each evaluates is the one that is saved, and resuming is exact."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from processes import run_script


@pytest.fixture(scope='module')
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp('distributed')
    run_script(Path(__file__).with_name('distributed_run.py'), path, processes=2)
    return path


def assert_same(one: dict, other: dict, ignore: str = 'observer_enabled') -> None:
    assert list(one) == list(other)
    for name, value in one.items():
        assert name.endswith(ignore) or torch.equal(value, other[name]), name


@pytest.mark.slow
@pytest.mark.parametrize(
    'name, saved', [('ptq', 'ptq/quantized.pth'), ('steps', 'steps/quantized.pth'), ('qat', 'qat/epoch_3.pth')]
)
def test_ranks_agree_with_each_other_and_with_the_checkpoint(folder, name, saved):
    ranks = [torch.load(folder / f'{name}_{rank}.pth', weights_only=True) for rank in range(2)]
    checkpoint = torch.load(folder / saved, weights_only=True)['state_dict']
    assert ranks[0]['quant_calibrated'].item() == 1
    assert_same(ranks[0], ranks[1])
    assert_same(ranks[0], checkpoint)


@pytest.mark.slow
def test_resumed_run_ends_in_the_same_bits(folder):
    for rank in range(2):
        whole, resumed = (torch.load(folder / f'{name}_{rank}.pth', weights_only=True) for name in ('qat', 'resumed'))
        assert_same(whole, resumed)
