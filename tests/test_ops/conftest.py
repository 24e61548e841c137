"""Compiled code from the first call on, as a test is too short to reach it."""

from __future__ import annotations

import pytest

from mmrazor_quant.ops import compiled


@pytest.fixture
def compile_at_once(monkeypatch):
    """Compile without waiting for work to add up; a failure to compile is an error."""

    def refuse(error: Exception) -> None:
        raise error

    monkeypatch.setattr(compiled.switch, 'on', True)
    monkeypatch.setattr(compiled.switch, 'patience', 0)
    monkeypatch.setattr(compiled, '_give_up', refuse)
