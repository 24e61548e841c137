"""Where the real data are, for the tests that need them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def data_root() -> Path:
    """Folder of the data; skips the test where there is none."""
    root = Path(os.environ.get('MMRAZOR_QUANT_DATA') or ROOT.parent / 'shared' / 'data')
    if not (root / 'cifar10_jpeg').is_dir():
        pytest.skip(f'no data in {root}; the environment variable MMRAZOR_QUANT_DATA names their folder')
    return root
