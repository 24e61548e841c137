"""Running a model for its values only, without leaving a trace on it."""

from __future__ import annotations

import copy
import random
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn


@contextmanager
def preserved(model: nn.Module) -> Iterator[ModelState]:
    """Restores buffers, attributes of modules (training flags among them) and every random state afterwards.

    Args:
        model: module that is run inside the block.

    Yields:
        The state that is restored.
    """
    saved = ModelState(model)
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield saved
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        saved.restore()


class ModelState:
    """Buffers and attributes of a model's modules at one moment."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = {path: _ModuleState(module) for path, module in model.named_modules()}

    def restore(self) -> None:
        """Brings the model back to this state."""
        for state in self._modules.values():
            state.restore()

    def assigned(self) -> list[str]:
        """Returns the attributes, by path, that have been given another value since."""
        return [f'{path}.{n}'.lstrip('.') for path, state in self._modules.items() for n in state.assigned()]


class _ModuleState:
    """What a forward may change of one module: its buffers and its attributes, and the contents of lists and the like.

    Heads count in lists what they have seen, and weigh their losses by it.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.buffers = {n: (b, None if b is None else b.detach().clone()) for n, b in module._buffers.items()}
        self.attributes = {n: v for n, v in vars(module).items() if n not in _CONTAINERS}
        self.contents = [_Contents(v) for n, v in self.attributes.items() if n not in _OF_EVERY_MODULE]

    def assigned(self) -> list[str]:
        now = {n: v for n, v in vars(self.module).items() if n not in _CONTAINERS}
        return [n for n, v in now.items() if n not in self.attributes or not _same(self.attributes[n], v)]

    @torch.no_grad()
    def restore(self) -> None:
        for name, (buffer, value) in self.buffers.items():
            self.module._buffers[name] = buffer
            if buffer is not None:
                buffer.copy_(value)
        attributes = vars(self.module)
        for name in [n for n in attributes if n not in self.attributes and n not in _CONTAINERS]:
            del attributes[name]
        attributes.update(self.attributes)
        for contents in self.contents:
            contents.restore()


class _Contents:
    """What is in a list, a dictionary, a set or a queue, and in those inside it."""

    def __init__(self, value: Any) -> None:
        self.value = value
        self.before = copy.copy(value) if isinstance(value, (list, dict, set, deque)) else None
        values = () if self.before is None else value.values() if isinstance(value, dict) else value
        self.inner = [_Contents(v) for v in values if isinstance(v, (list, dict, set, deque))]

    def restore(self) -> None:
        if self.before is not None and not _is_same(self.value, self.before):
            self.value.clear()
            (self.value.update if isinstance(self.value, (dict, set)) else self.value.extend)(self.before)
        for contents in self.inner:
            contents.restore()


def _is_same(a: Any, b: Any) -> bool:
    """Tells whether the same objects are in two containers, in the same order."""
    a, b = ([*x.items()] if isinstance(x, dict) else [(v,) for v in x] for x in (a, b))
    return len(a) == len(b) and all(m is n for x, y in zip(a, b) for m, n in zip(x, y))


def _same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    plain = (int, float, str, tuple, type(None))
    return isinstance(a, plain) and type(a) is type(b) and a == b


_CONTAINERS = ('_parameters', '_buffers', '_modules')

_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
"""Hooks among them, which are not the forward's to change."""


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
