"""Fixtures of the reconstruction tests."""

from __future__ import annotations

import pytest

from mmrazor_quant import ops


@pytest.fixture(autouse=True)
def eager():
    """Compiling takes longer than all that these tests compute."""
    with ops.eager_mode():
        yield
