"""On two ranks, learned scales that start from a batch of the rank's own are the same in the end."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_ranks_agree(tmp_path):
    paths = [str(ROOT), str(Path(__file__).parent), os.environ.get('PYTHONPATH', '')]
    launcher = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2']
    process = subprocess.run(
        [*launcher, str(Path(__file__).with_name('distributed_start_run.py')), str(tmp_path)],
        env={**os.environ, 'PYTHONPATH': os.pathsep.join(filter(None, paths)), 'OMP_NUM_THREADS': '1'},
        capture_output=True, text=True, cwd=tmp_path)  # fmt: skip
    assert process.returncode == 0, process.stderr[-3000:]
    one, two = (torch.load(tmp_path / f'{rank}.pth', weights_only=True) for rank in range(2))
    for name, value in one.items():
        assert name.endswith('observer_enabled') or torch.equal(value, two[name]), name
    assert one['head.input_fake_quant.initialized'].item() == 1 and one['head.input_fake_quant.scale'].item() != 1
