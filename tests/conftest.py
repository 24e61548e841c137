"""Fixtures of all tests."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch


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
