"""The launch scripts run the tools on several processes, and hand over what they are given."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
TOY_FOLDER = ROOT / 'tests' / 'test_engine'


def free_port() -> int:
    with socket.socket() as server:
        server.bind(('127.0.0.1', 0))
        return server.getsockname()[1]


def run(script: str, *arguments: str) -> subprocess.CompletedProcess:
    paths = os.pathsep.join(filter(None, [str(ROOT), str(TOY_FOLDER), os.environ.get('PYTHONPATH')]))
    environment = {**os.environ, 'PYTHONPATH': paths, 'PYTHON': sys.executable, 'PORT': str(free_port())}
    environment['OMP_NUM_THREADS'] = '1'
    command = [str(ROOT / 'tools' / script), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_train_and_test_on_two_processes(write_config, tmp_path):
    config = write_config(work_dir=tmp_path / 'work')

    trained = run('dist_train.sh', config, '2', '--cfg-options', 'train_cfg.max_epochs=1')
    assert trained.returncode == 0, trained.stderr[-3000:]
    checkpoint = tmp_path / 'work' / 'epoch_1.pth'
    assert torch.load(checkpoint, weights_only=True)['state_dict']['quant_calibrated'].item() == 1
    # 32 images in batches of 8 on each of two processes.
    assert '[2/2]' in trained.stdout + trained.stderr

    tested = run('dist_test.sh', config, str(checkpoint), '2')
    assert tested.returncode == 0, tested.stderr[-3000:]
    assert 'toy/accuracy' in tested.stdout + tested.stderr


@pytest.mark.parametrize('script', ['dist_train.sh', 'dist_test.sh'])
def test_usage(script):
    process = run(script, 'config.py', 'many')

    assert process.returncode == 2
    assert process.stderr.startswith(f'usage: tools/{script} CONFIG PROCESSES')


@pytest.mark.parametrize('tool', ['train', 'test'])
def test_slurm_hands_over_what_it_is_given(tool, tmp_path, monkeypatch):
    srun = tmp_path / 'srun'
    srun.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$@"\n')
    srun.chmod(0o755)
    monkeypatch.setenv('PATH', f'{tmp_path}{os.pathsep}{os.environ["PATH"]}')
    monkeypatch.setenv('GPUS', '16')

    process = run(f'slurm_{tool}.sh', 'part', 'job', 'config.py', '--work-dir', 'a folder')

    words = process.stdout.splitlines()
    assert {'--partition=part', '--job-name=job', '--ntasks=16', '--gres=gpu:8'} <= set(words)
    assert words[-5:] == ['config.py', '--work-dir', 'a folder', '--launcher', 'slurm']
    assert Path(words[-6]).resolve() == ROOT / 'tools' / f'{tool}.py'


def test_slurm_usage():
    assert run('slurm_train.sh', 'part').returncode == 2
