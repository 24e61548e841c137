"""Memory that is freed is there for the next step, unless the environment says otherwise."""

import os
import subprocess
import sys

import pytest

_SCRIPT = """
import resource, torch
from mmrazor_quant.engine.memory import keep_freed_memory
kept = keep_freed_memory()
fill = lambda: [torch.ones(n) for n in (2**24, 2**21, 2**20)] and None
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
# The heap grows until the blocks find their places among smaller ones.
for _ in range(3):
    fill()
before = faults()
for _ in range(5):
    fill()
print(kept, (faults() - before) * resource.getpagesize())
"""


def _run(**variables: str) -> tuple[bool, int]:
    env = {name: value for name, value in os.environ.items() if 'MALLOC' not in name}
    done = subprocess.run(
        [sys.executable, '-c', _SCRIPT], env={**env, **variables}, capture_output=True, text=True, check=True
    )
    kept, size = done.stdout.split()[-2:]
    return kept == 'True', int(size)


@pytest.mark.skipif(sys.platform != 'linux', reason='a setting of glibc')
def test_freed_memory_is_used_again_without_the_system():
    kept, size = _run()
    if not kept:
        pytest.skip('no glibc here')
    one_round = 4 * (2**24 + 2**21 + 2**20)
    assert size < one_round / 10


@pytest.mark.skipif(sys.platform != 'linux', reason='a setting of glibc')
def test_environment_comes_first():
    kept, size = _run(MALLOC_MMAP_THRESHOLD_='1000000')
    assert not kept
    assert size > 4 * 2**24
