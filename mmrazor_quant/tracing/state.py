"""Running a model for its values only, without leaving a trace on it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn


@contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Restores buffers, training flags and every random state when the block ends.

    Args:
        model: module whose buffers (BN statistics) and training flags are kept.
    """
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    flags = [(module, module.training) for module in model.modules()]
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
        for module, training in flags:
            module.training = training


@contextmanager
def seeded(seed: int = 0) -> Iterator[None]:
    """Runs the block under a fixed seed of torch, numpy and Python, and restores their states afterwards."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            np.random.seed(seed)
            random.seed(seed)
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
