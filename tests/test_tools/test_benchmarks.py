"""A small slice of each benchmark: what it prints, not how fast anything is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / 'tools' / 'benchmarks'
QAT_STEP = ['qat_step.py', '--random', '--rounds', '1', '--batch', '2', '--threads', '1']


def run(name: str, *arguments: str) -> dict:
    """Run a benchmark; returns its figures."""
    command = [sys.executable, str(BENCHMARKS / name), *arguments]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-3000:]
    return json.loads(process.stdout.splitlines()[-1])


@pytest.mark.slow
def test_qat_step():
    figures = run(*QAT_STEP, '--fake-quants', 'fixed,lsq')

    assert set(figures) == {'fixed', 'lsq'}
    assert all(set(each) == {'time', 'memory'} and each['time'] > 0 for each in figures.values())
    # What the quantized step keeps besides is a copy of the activations.
    assert all(1 < each['memory'] < 2 for each in figures.values())


@pytest.mark.slow
def test_calibration():
    figures = run('calibration.py', '--random', '--rounds', '5', '--images', '8', '--threads', '1')

    assert set(figures) == {'minmax', 'mse', 'evaluate'}
    assert min(figures.values()) > 0


@pytest.mark.slow
def test_capture():
    figures = run('capture.py', '--models', 'resnet20', 'yolox-nano', '--rounds', '5', '--threads', '1')

    assert set(figures) == {'resnet20', 'yolox-nano'}
    assert min(figures.values()) > 0


def test_unknown_fake_quantizer_is_refused_with_the_known_ones():
    command = [sys.executable, str(BENCHMARKS / 'qat_step.py'), '--fake-quants', 'lsq,magic']

    process = subprocess.run(command, capture_output=True, text=True)

    assert process.returncode == 2
    assert 'unknown magic' in process.stderr and 'lsq_plus' in process.stderr


@pytest.mark.slow
def test_reconstruction():
    arguments = ['--random', '--images', '16', '--iters', '2', '--threads', '1', '--bits', '2/4', '--seeds', '2']

    figures = run('reconstruction.py', *arguments, '--method', 'qdrop', '--options', 'cache_gib=0.0005', 'batch_size=4')

    assert set(figures) == {'top1', 'calibration_U', 'reconstruction_U'}
    assert 0 <= figures['top1'] <= 100 and min(figures['calibration_U'], figures['reconstruction_U']) > 0
