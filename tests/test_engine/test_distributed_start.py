"""On two ranks, learned scales that start from a batch of the rank's own are the same in the end."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from processes import run_script


@pytest.mark.slow
def test_ranks_agree(tmp_path):
    run_script(Path(__file__).with_name('distributed_start_run.py'), tmp_path, processes=2)
    one, two = (torch.load(tmp_path / f'{rank}.pth', weights_only=True) for rank in range(2))
    for name, value in one.items():
        assert name.endswith('observer_enabled') or torch.equal(value, two[name]), name
    assert one['head.input_fake_quant.initialized'].item() == 1 and one['head.input_fake_quant.scale'].item() != 1
