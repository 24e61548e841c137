"""Processes that see parts of each batch know what one that sees all of it knows."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import two_processes
from two_processes import NAMES, SIZES

from mmrazor_quant import ops
from mmrazor_quant.ops.compiled import EAGER_VARIABLE

ROOT = Path(__file__).resolve().parents[2]
IDS = ['-'.join(name) for name in NAMES]
TOLERANCES = {
    # Where one process searches among the values, two search on their joint histogram.
    'mse_values': 0.1,
    'ema_mse_values': 0.1,
    'ema_percentile': 0.01,
    # Each process takes its own sample, and the divergence is flat around its minimum.
    'kl_sampled': 0.35,
}
"""Relative tolerance of scales; 1e-5 by default."""


@pytest.fixture(autouse=True)
def eager():
    """Compiled and eager searches may choose differently between candidates that are equally good."""
    with ops.eager_mode():
        yield


@pytest.fixture(scope='module')
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp('observers')
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH')]))
    script = Path(two_processes.__file__)
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(folder)],
            env={**os.environ, 'PYTHONPATH': paths, EAGER_VARIABLE: '1'}, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]  # fmt: skip
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert all(process.returncode == 0 for process in processes), errors
    return [torch.load(folder / f'{rank}.pt') for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize('name', NAMES, ids=IDS)
def test_statistics_of_all_processes_are_the_same_at_any_time(results, name):
    for step, (one, other) in enumerate(zip(results[0]['joint'][name], results[1]['joint'][name])):
        for key in one:
            assert torch.equal(one[key], other[key]), (step, key)


@pytest.mark.slow
@pytest.mark.parametrize('name', NAMES, ids=IDS)
def test_one_process_with_the_joint_batches_knows_the_same(results, name):
    single = two_processes.build(*name)
    single.load_state_dict(single.state_dict())  # MSEObserver keeps no values after this
    tolerance = TOLERANCES.get(name[0], 1e-5)
    for step in range(len(SIZES)):
        single(torch.cat([two_processes.batch(step, rank) for rank in range(2)]))
        found, expected = results[0]['joint'][name][step], two_processes.known(single)
        torch.testing.assert_close(found['scale'], expected['scale'], rtol=tolerance, atol=0)
        if tolerance == 1e-5:
            for key in expected:
                torch.testing.assert_close(found[key], expected[key], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_a_process_that_sees_bad_values_or_nothing(results):
    assert results[0]['refusals'] == results[1]['refusals']
    messages = ['the observed data contain NaN or infinite values', 'no data were observed']
    for i, (kind, _) in enumerate(NAMES):
        assert results[0]['refusals'][2 * i : 2 * i + 2] == (['accepted'] * 2 if kind == 'fixed' else messages), kind


@pytest.mark.slow
@pytest.mark.parametrize('name', NAMES, ids=IDS)
def test_processes_that_do_not_observe_jointly(results, name):
    for rank in range(2):
        single = two_processes.build(*name)
        for step in range(len(SIZES) if rank else 1, 0, -1):
            single(two_processes.batch(step - 1, rank))
        found = results[rank]['apart'][name]
        for key, value in single.state_dict().items():
            torch.testing.assert_close(found[key], value)
