"""Walking through nested arguments, results and attributes."""

from __future__ import annotations

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
    """Yields tensors kept in ordinary attributes of the modules (lists and dicts of tensors included)."""
    for module in root.modules():
        for name, value in vars(module).items():
            if name in ('_parameters', '_buffers', '_modules'):
                continue
            yield from (leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor))
