"""Walking through nested arguments, results and attributes."""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn


def leaves(value: Any) -> Iterator[Any]:
    """Yields what tuples, lists, dicts and slices, nested in any way, hold."""
    if isinstance(value, (tuple, list)):
        for item in value:
            yield from leaves(item)
    elif isinstance(value, dict):
        yield from leaves(list(value.values()))
    elif isinstance(value, slice):
        yield from (value.start, value.stop, value.step)
    else:
        yield value


def rebuild(container: tuple | list, items: list[Any]) -> Any:
    """Returns ``items`` in a container of the same type (torch's return types and named tuples included)."""
    kind = type(container)
    if hasattr(container, '_fields'):
        return kind(*items)
    return kind(items)


def is_number(value: Any) -> bool:
    """Tells whether a value is a number or bool, or a tuple or list that holds one."""
    if isinstance(value, (tuple, list)):
        return any(is_number(item) for item in value)
    return isinstance(value, (int, float, complex))


def is_plain(value: Any) -> bool:
    """Tells whether a value can be written into a graph as it is."""
    plain = (int, float, str, bool, type(None), complex, torch.dtype, torch.device, torch.layout, torch.memory_format)
    return all(isinstance(leaf, plain) for leaf in leaves(value))


def attribute_tensors(root: nn.Module) -> Iterator[torch.Tensor]:
    """Yields tensors kept in ordinary attributes of the modules: in lists and dicts, and in objects, too.

    Heads keep the generator of their anchors, which keeps the anchors.
    """
    seen: set[int] = set()
    for module in root.modules():
        values = [value for name, value in vars(module).items() if name not in _CONTAINERS]
        yield from _tensors_in(values, _OBJECTS_DEEP, seen)


def _tensors_in(values: list[Any], depth: int, seen: set[int]) -> Iterator[torch.Tensor]:
    for leaf in pytree.tree_leaves(values):
        if isinstance(leaf, torch.Tensor):
            yield leaf
        elif depth and _is_object(leaf) and id(leaf) not in seen:
            seen.add(id(leaf))
            yield from _tensors_in(list(vars(leaf).values()), depth - 1, seen)


def _is_object(value: Any) -> bool:
    """Tells whether a value is an instance with attributes, of a class that is no module of a network."""
    return hasattr(value, '__dict__') and not isinstance(value, (type, nn.Module, types.ModuleType, types.FunctionType))


_CONTAINERS = ('_parameters', '_buffers', '_modules')

_OBJECTS_DEEP = 2
"""How many objects inside each other are looked into."""
