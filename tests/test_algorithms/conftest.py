"""Data that the tests of this folder share."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_detectors import write_boxes


@pytest.fixture(scope='session')
def boxes(tmp_path_factory) -> Path:
    """Folder of images with two rectangles each, annotated as COCO is."""
    root = tmp_path_factory.mktemp('boxes')
    write_boxes(root)
    return root
