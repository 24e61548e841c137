"""Running scripts of the tests in processes of their own, on CPUs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent
RANKS = ('-m', 'torch.distributed.run', '--standalone', '--nproc_per_node')


def environment_of(script: Path) -> dict[str, str]:
    """Give the environment of a script that imports what lies beside it, and what tests share; it has no GPU."""
    paths = [str(TESTS.parent), str(script.parent), str(TESTS), os.environ.get('PYTHONPATH', '')]
    # Ranks would share one machine's GPU, which NCCL does not take, and a process that uses a GPU cannot be forked.
    return {**os.environ, 'PYTHONPATH': os.pathsep.join(filter(None, paths)), 'CUDA_VISIBLE_DEVICES': ''}


def run_script(script: Path, folder: Path, processes: int = 1, **variables: str) -> None:
    """Run ``script folder`` to its end, which must be a good one.

    Args:
        script: What to run.
        folder: Its argument, and the directory that it runs in.
        processes: How many processes that know of each other.
        **variables: Environment variables.
    """
    launcher = [*RANKS, str(processes)] if processes > 1 else []
    environment = {**environment_of(script), 'OMP_NUM_THREADS': '1', **variables}
    process = subprocess.run(
        [sys.executable, *launcher, str(script), str(folder)],
        env=environment, capture_output=True, text=True, cwd=folder)  # fmt: skip
    assert process.returncode == 0, process.stderr[-3000:]
