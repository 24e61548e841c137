"""Randomness of training as a pure function of the seed and of the place in training.

mmengine restores neither the state of the random generators nor that of the data-loading workers, so a resumed run
would draw other numbers than the uninterrupted one. Instead of saving states (each rank has its own, and only one
writes checkpoints), the generators are seeded anew before every iteration from numbers that identify it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch

EPOCH, ITERATION, CALIBRATION, WORKER = range(4)
"""First number of the key of a seed: what the others count."""


def seed_from(*key: int) -> int:
    """Mix a key into a seed, so that neighbouring keys have unrelated seeds.

    Args:
        *key: Numbers >= 0.

    Returns:
        A seed of 32 bits.
    """
    return int(np.random.SeedSequence(key).generate_state(1)[0])


def seed_everything(*key: int) -> None:
    """Seed python, numpy and torch on all devices (0.15 ms).

    Args:
        *key: Numbers >= 0 that identify the moment.
    """
    seed = seed_from(*key)
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


class WorkerInit:
    """A ``worker_init_fn`` whose seeds depend on the run, the epoch, the rank and the worker.

    mmengine's own gives each worker the same seed in every epoch: the workers repeat their random augmentations.

    Args:
        key: Numbers >= 0 that identify the run, the epoch and the rank.
        before: ``worker_init_fn`` of the config, called before seeding.
    """

    def __init__(self, key: tuple[int, ...], before: Callable[[int], None] | None = None) -> None:
        self.key = key
        self.before = before

    def __call__(self, worker_id: int) -> None:
        """Seed the generators of this worker process.

        Args:
            worker_id: Number of the worker.
        """
        if self.before is not None:
            self.before(worker_id)
        seed_everything(WORKER, *self.key, worker_id)


@contextmanager
def preserved_randomness() -> Iterator[None]:
    """Put the generators back where they were before the block."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(enabled=True):
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
