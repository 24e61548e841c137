"""Fixtures of all tests."""

from __future__ import annotations

import contextlib
import random
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.registry import DefaultScope

from mmrazor_quant.ops import compiled

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny tensors are faster without threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def same_random_numbers():
    """Every test draws the same numbers, whatever ran before it."""
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)


@contextlib.contextmanager
def default_scopes_kept() -> Iterator[None]:
    """Forget the scopes that runners set for the whole process; mmengine has no way to do so."""
    scopes = DefaultScope._instance_dict
    before = dict(scopes)
    yield
    scopes.clear()
    scopes.update(before)


@pytest.fixture(scope='module', autouse=True)
def default_scopes_of_the_module():
    """No module depends on which ones ran before it in the same process."""
    with default_scopes_kept():
        yield


@pytest.fixture(autouse=True)
def default_scopes_of_the_test():
    """No test depends on which ones ran before it."""
    with default_scopes_kept():
        yield


@pytest.fixture
def compile_at_once(monkeypatch):
    """Compile formulas from the first call on, as a test is too short to reach it; a failure to compile is an error."""

    def refuse(error: Exception) -> None:
        raise error

    monkeypatch.setattr(compiled.switch, 'on', True)
    monkeypatch.setattr(compiled.switch, 'patience', 0)
    monkeypatch.setattr(compiled, '_give_up', refuse)


@pytest.fixture
def run_tool(monkeypatch) -> Callable[..., str | None]:
    """Run a tool as a script; returns the message it exits with, None for success."""

    def run(name: str, *arguments: str) -> str | None:
        monkeypatch.setattr(sys, 'argv', [f'tools/{name}.py', *map(str, arguments)])
        try:
            runpy.run_path(str(ROOT / 'tools' / f'{name}.py'), run_name='__main__')
        except SystemExit as stop:
            return stop.code
        return None

    return run


@pytest.fixture
def expect_error(run_tool) -> Callable[..., str]:
    """Run a tool that must fail with a readable line; returns it."""

    def run(name: str, *arguments: str) -> str:
        message = run_tool(name, *arguments)
        assert isinstance(message, str), 'the tool must exit with a message, which makes the exit code 1'
        assert message.startswith('error: ')
        return message

    return run
