"""Two processes train, observe, learn scales and resume as one process with the joint batch does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from joint_runs import RUNS
from processes import run_script


@pytest.fixture(scope='module')
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp('joint')
    for processes in (1, 2):
        run_script(Path(__file__).with_name('joint_runs.py'), path, processes)
    return path


def state(folder: Path, name: str) -> dict[str, torch.Tensor]:
    return torch.load(folder / f'{name}.pth', weights_only=True)


@pytest.mark.slow
@pytest.mark.parametrize('name', RUNS)
def test_two_processes_are_one_with_the_joint_batch(folder, name):
    single, joint = state(folder, f'{name}_1_0'), state(folder, f'{name}_2_0')

    assert list(single) == list(joint)
    for key, value in single.items():
        torch.testing.assert_close(joint[key], value, rtol=1e-3, atol=1e-4, msg=lambda m, key=key: f'{key}: {m}')


@pytest.mark.slow
@pytest.mark.parametrize('name', RUNS)
def test_ranks_have_the_same_parameters_and_buffers(folder, name):
    one, other = state(folder, f'{name}_2_0'), state(folder, f'{name}_2_1')

    for key, value in one.items():
        assert torch.equal(value, other[key]), key


@pytest.mark.slow
def test_batch_norms_folded_with_joint_statistics(folder):
    single, joint = state(folder, 'synchronized_1_0'), state(folder, 'synchronized_2_0')

    assert list(single) == list(joint) and 'weight gradient' in single
    for key, value in single.items():
        torch.testing.assert_close(joint[key], value, rtol=1e-4, atol=1e-5, msg=lambda m, key=key: f'{key}: {m}')
        assert torch.equal(joint[key], state(folder, 'synchronized_2_1')[key]), key


@pytest.mark.slow
@pytest.mark.parametrize('world', [1, 2])
def test_learned_scales_resume_bit_for_bit(folder, world):
    whole, resumed = state(folder, f'learned_{world}_0'), state(folder, f'learned_{world}_0_resumed')

    for key, value in whole.items():
        assert torch.equal(value, resumed[key]), key


@pytest.mark.slow
def test_scales_were_learned(folder):
    trained = state(folder, 'learned_1_0')
    start = torch.load(folder / 'learned_1' / 'epoch_1.pth', weights_only=True)['state_dict']
    learned = [key for key in trained if key.endswith(('fake_quant.scale', 'fake_quant.offset'))]

    assert learned
    assert all(not torch.equal(trained[key], start[key]) for key in learned)
