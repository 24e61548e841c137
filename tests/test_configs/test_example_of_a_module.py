"""The worked example of a module that was built in Python."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).resolve().parents[2] / 'configs' / 'examples' / 'built_module.py'


def test_quantized_as_good_as_float(capsys):
    pytest.importorskip('sklearn')

    results = runpy.run_path(str(EXAMPLE))['main']()

    assert results['float'] > 95
    assert abs(results['float'] - results['w8a8']) < 1
    assert 'w8a8' in capsys.readouterr().out
