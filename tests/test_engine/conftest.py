"""Fixtures of the loop tests."""

from __future__ import annotations

import logging

import pytest
from mmengine.logging import MMLogger
from mmengine.runner import Runner
from toy import config


@pytest.fixture
def make_runner(tmp_path):
    """Build a runner of the toy config with changes; see :func:`toy.config`."""

    def make(**changes) -> Runner:
        return Runner.from_cfg(config(changes.pop('work_dir', tmp_path), **changes))

    return make


@pytest.fixture
def log():
    """Collect what the current runner logs; call it with the runner."""
    handlers = []

    def collect(runner: Runner) -> list[str]:
        lines: list[str] = []

        class Collect(logging.Handler):
            def emit(self, record: logging.LogRecord) -> None:
                lines.append(record.getMessage())

        handlers.append((runner.logger, Collect()))
        runner.logger.addHandler(handlers[-1][1])
        return lines

    yield collect
    for logger, handler in handlers:
        logger.removeHandler(handler)
    assert MMLogger.get_current_instance() is not None
