"""What the launch scripts hand over. (What several processes compute is tested in test_engine/test_joint_batch.py.)"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(script: str, *arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, 'PYTHON': sys.executable}
    command = [str(ROOT / 'tools' / script), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


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
