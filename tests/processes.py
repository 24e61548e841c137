"""Running scripts of the tests in processes of their own, on CPUs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent
RANKS = ('-m', 'torch.distributed.run', '--standalone', '--nproc_per_node')


def run_script(script: Path, folder: Path, processes: int = 1, **variables: str) -> None:
    """Run ``script folder`` to its end, which must be a good one.

    Args:
        script: What to run; it may import what lies beside it, and what tests share.
        folder: Its argument, and the directory that it runs in.
        processes: How many processes that know of each other.
        **variables: Environment variables.
    """
    paths = [str(TESTS.parent), str(script.parent), str(TESTS), os.environ.get('PYTHONPATH', '')]
    # Ranks share one machine's GPU, if it has any, which NCCL does not take.
    own = {'PYTHONPATH': os.pathsep.join(filter(None, paths)), 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': ''}
    launcher = [*RANKS, str(processes)] if processes > 1 else []
    process = subprocess.run(
        [sys.executable, *launcher, str(script), str(folder)],
        env={**os.environ, **own, **variables}, capture_output=True, text=True, cwd=folder)  # fmt: skip
    assert process.returncode == 0, process.stderr[-3000:]
