"""Processes that see different data agree on the parameters."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import two_processes

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope='module')
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp('observers')
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH')]))
    script = Path(two_processes.__file__)
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(folder)],
            env={**os.environ, 'PYTHONPATH': paths}, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]  # fmt: skip
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert all(process.returncode == 0 for process in processes), errors
    return [torch.load(folder / f'{rank}.pt') for rank in range(2)]


@pytest.mark.slow
def test_processes_agree(results):
    one, other = results
    for name in one:
        assert all(map(torch.equal, one[name], other[name])), name


@pytest.mark.slow
def test_result_is_that_of_all_data(results):
    single = two_processes.observers()
    both = [two_processes.data(rank) for rank in range(2)]
    for name in ('min_max', 'mse'):
        for x in both:
            single[name](x)
    for name in ('one_sees_nothing', 'ema_one_sees_nothing'):
        single[name](both[0])
    for name in ('min_max', 'one_sees_nothing', 'ema_one_sees_nothing'):
        torch.testing.assert_close(results[0][name][0], single[name].calculate_qparams()[0])
    torch.testing.assert_close(results[0]['mse'][0], single['mse'].calculate_qparams()[0], rtol=0.03, atol=0)
    for x in both:
        single['ema'].reset()
        single['ema'](x)
    ends = torch.stack([torch.stack(torch.aminmax(x)) for x in both]).mean(0)
    expected = single['ema'].to_qparams(*ends)[0]
    torch.testing.assert_close(results[0]['ema'][0], expected.reshape(1))
