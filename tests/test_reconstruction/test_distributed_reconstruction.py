"""On two ranks with half of the images each, both end with the same rounding, steps and scales."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from processes import run_script


@pytest.fixture(scope='module')
def ranks(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp('distributed')
    script = Path(__file__).with_name('distributed_reconstruction_run.py')
    run_script(script, folder, processes=2, MMRAZOR_QUANT_EAGER='1')
    return [torch.load(folder / f'rank_{rank}.pth', weights_only=True) for rank in range(2)]


@pytest.mark.slow
def test_ranks_learn_the_same(ranks):
    one, other = (rank['state'] for rank in ranks)

    assert one.keys() == other.keys()
    assert [key for key in one if not torch.equal(one[key], other[key])] == []
    assert torch.equal(ranks[0]['output'], ranks[1]['output'])


@pytest.mark.slow
def test_a_second_run_goes_on_where_the_first_ended(ranks):
    assert ranks[0]['loaded']
    for rank in ranks:
        assert [key for key, value in rank['state'].items() if not torch.equal(value, rank['resumed'][key])] == []


@pytest.mark.slow
def test_all_kinds_of_parameters_are_learned_and_losses_are_joint(ranks):
    start, state = ranks[0]['start'], ranks[0]['state']

    changed = {key for key in state if not torch.equal(start[key], state[key])}
    assert any(key.endswith('integers') for key in changed)
    assert any(key.endswith('input_fake_quant.scale') for key in changed)
    assert any(key.endswith('weight_fake_quant.scale') for key in changed)
    assert ranks[0]['losses'] == ranks[1]['losses']
    assert all(after <= before for before, after in ranks[0]['losses'][1:])
