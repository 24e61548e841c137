"""Killed at any moment and resumed, QAT ends in the same bits as without interruption."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from processes import environment_of
from toy import dataloader


def keep(number: int, **fields) -> dict:
    return {'checkpoint': {'type': 'CheckpointHook', 'max_keep_ckpts': number, **fields}}


EPOCHS = {
    'train_cfg': {'type': 'mmrazor.QATEpochBasedLoop', 'max_epochs': 4, 'calibrate_steps': 2, 'act_quant_begin': 1,
                  'freeze_bn_begin': 3},
    'custom_hooks': [{'type': 'EMAHook', 'momentum': 0.1, 'update_buffers': True}],
    'default_hooks': keep(1, interval=1, save_best='toy/accuracy', rule='less'),
}  # fmt: skip
ITERATIONS = {
    'train_cfg': {'type': 'mmrazor.QATIterBasedLoop', 'max_iters': 14, 'val_interval': 5, 'observe_end': 9,
                  'act_quant_begin': 3},
    'train_dataloader': dataloader(shuffle=True, augment=True, sampler='InfiniteSampler'),
    'default_hooks': keep(1, by_epoch=False, interval=4),
    'param_scheduler': {'type': 'CosineAnnealingLR', 'T_max': 14, 'by_epoch': False},
}  # fmt: skip


def with_workers(changes: dict, sampler: str) -> dict:
    loader = dataloader(shuffle=True, augment=True, sampler=sampler, workers=2)
    return {**changes, 'train_dataloader': {**loader, 'persistent_workers': True}}


SETTINGS = {
    'epochs': (EPOCHS, 'epoch_4.pth', [{'iteration': 7}, {'writing': 3}, {'val': 2}]),
    'epochs_workers': (with_workers(EPOCHS, 'DefaultSampler'), 'epoch_4.pth', [{'iteration': 11}]),
    'epochs_without_seed': ({**EPOCHS, 'randomness': {'seed': None}}, 'epoch_4.pth', [{'iteration': 10}]),
    'middle_of_epochs': (
        {**EPOCHS, 'default_hooks': keep(2, by_epoch=False, interval=3)}, 'iter_16.pth', [{'iteration': 8}]),
    'iterations': (ITERATIONS, 'iter_14.pth', [{'iteration': 2}, {'iteration': 10}, {'writing': 2}]),
    'iterations_workers': (with_workers(ITERATIONS, 'InfiniteSampler'), 'iter_14.pth', [{'iteration': 11}]),
    'iterations_without_seed': ({**ITERATIONS, 'randomness': {'seed': None}}, 'iter_14.pth', [{'iteration': 6}]),
}  # fmt: skip
pytestmark = pytest.mark.slow

CASES = [(name, index) for name, (_, _, kills) in SETTINGS.items() for index in range(len(kills))]


def specifications(folder: Path, names: list[str]) -> list[dict]:
    """List the runs of some settings: one killed and resumed for each moment, and one uninterrupted.

    Without a seed in the config, the uninterrupted run is given the one that the killed run drew.
    """
    specs = []
    for name in names:
        changes, last, kills = SETTINGS[name]
        for index, kill in enumerate(kills):
            work_dir = str(folder / f'{name}_{index}')
            specs.append({'work_dir': work_dir, 'changes': changes, 'kill': kill})
            specs.append({'work_dir': work_dir, 'changes': changes, 'resume': True})
        spec = {'work_dir': str(folder / name), 'changes': changes}
        if 'without_seed' in name:
            spec['seed_of'] = str(folder / f'{name}_0' / last)
        specs.append(spec)
    return specs


@pytest.fixture(scope='module')
def runs(tmp_path_factory) -> tuple[Path, list[tuple[str, int]], str]:
    """Run everything in two processes that fork; returns the folder, work directories with exit codes, the log."""
    folder = tmp_path_factory.mktemp('resume')
    script = Path(__file__).with_name('resume_runs.py')
    processes = []
    for part in range(2):
        names = list(SETTINGS)[part::2]
        (folder / f'{part}.json').write_text(json.dumps(specifications(folder, names)))
        processes.append(
            subprocess.Popen(
                [sys.executable, str(script), str(folder / f'{part}.json')], env=environment_of(script),
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder))  # fmt: skip
    outputs = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], [errors[-3000:] for _, errors in outputs]
    log = ''.join(output for output, _ in outputs)
    ended = [json.loads(line) for line in log.splitlines() if line.startswith('{"work_dir"')]
    return folder, [(Path(each['work_dir']).name, each['code']) for each in ended], log


def test_the_runs_were_killed_and_finished(runs):
    _, ended, log = runs
    killed = {f'{name}_{index}' for name, index in CASES}
    codes: dict[str, list[int]] = {}
    for name, code in ended:
        codes.setdefault(name, []).append(code)
    assert set(codes) == killed | set(SETTINGS)
    for name, each in codes.items():
        assert each == ([-signal.SIGKILL, 0] if name in killed else [0]), name
    # Before the first checkpoint there is nothing to resume from.
    assert log.count('resumes from None') == 1


@pytest.mark.parametrize('name, index', CASES)
def test_resumed_run_ends_in_the_same_bits(runs, name, index):
    folder, _, _ = runs
    last = SETTINGS[name][1]
    expected = torch.load(folder / name / last, weights_only=True)
    actual = torch.load(folder / f'{name}_{index}' / last, weights_only=True)
    for part in {'state_dict', 'ema_state_dict'} & set(expected):
        assert list(actual[part]) == list(expected[part])
        for key, value in expected[part].items():
            assert torch.equal(actual[part][key], value), key
    momenta = zip(expected['optimizer']['state'].items(), actual['optimizer']['state'].values())
    for key, (one, other) in ((key, (one, other)) for (key, one), other in momenta):
        assert torch.equal(one['momentum_buffer'], other['momentum_buffer']), key
    assert expected['state_dict']['quant_calibrated'].item() == 1


def test_runs_depend_on_their_seed(runs):
    """The comparison above would see a difference."""
    folder, _, _ = runs
    one = torch.load(folder / 'epochs' / 'epoch_4.pth', weights_only=True)
    other = torch.load(folder / 'epochs_without_seed' / 'epoch_4.pth', weights_only=True)
    workers = torch.load(folder / 'epochs_workers' / 'epoch_4.pth', weights_only=True)
    weights = [each['state_dict']['backbone.conv.weight'] for each in (one, other, workers)]
    assert not torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
