"""Fixtures of the tool tests: tools run in this process, on the toy of the loop tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from mmengine.config import Config

ROOT = Path(__file__).resolve().parents[2]
TOY_FOLDER = ROOT / 'tests' / 'test_engine'


@pytest.fixture(autouse=True)
def toy_is_importable(monkeypatch):
    """Let configs name the toy in ``custom_imports``."""
    monkeypatch.syspath_prepend(str(TOY_FOLDER))


@pytest.fixture
def write_config(tmp_path) -> Callable[..., str]:
    """Write a config of the toy to a file; changes as for :func:`toy.config`."""

    def write(name: str = 'toy_config.py', **changes) -> str:
        from toy import config

        cfg: Config = config(changes.pop('work_dir', tmp_path / 'work'), **changes)
        cfg.custom_imports = {'imports': ['toy'], 'allow_failed_imports': False}
        path = tmp_path / name
        cfg.dump(path)
        return str(path)

    return write
