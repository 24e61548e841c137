"""The calls of an island during calibration as samples: what the units are run on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .cache import ActivationCache


@dataclass
class Call:
    """One call of an island.

    Args:
        batch: Number of the calibration batch.
        number: How many calls of this island the batch had before.
        inputs: The tensors, and the numbers that vary between calls, in the order of the graph's inputs.
        kind: What tells calls of different graphs apart.
    """

    batch: int
    number: int
    inputs: list[Any]
    kind: int = 0

    @property
    def key(self) -> tuple[int, int]:
        """What names the call."""
        return self.batch, self.number


@dataclass
class Group:
    """Calls whose samples have equal shapes, so that samples of all of them can be in one batch.

    Args:
        kind: Kind of the calls.
        calls: The calls, in order.
        sizes: Samples of each call: rows of its tensors.
        divisible: Whether the samples of a call can be taken apart; otherwise a call is one sample.
    """

    kind: int
    calls: list[Call] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    divisible: bool = True

    @property
    def count(self) -> int:
        """Number of samples."""
        return sum(self.sizes) if self.divisible else 1

    def rows(self, index: int) -> slice:
        """Give the samples of a call."""
        start = sum(self.sizes[:index])
        return slice(start, start + self.sizes[index])


def group_calls(calls: list[Call]) -> list[Group]:
    """Sort calls into groups.

    Args:
        calls: All calls of an island.

    Returns:
        The groups, in the order in which their first calls came.
    """
    groups: dict[tuple, Group] = {}
    for call in calls:
        shapes = tuple((tuple(x.shape[1:]), x.dtype) if isinstance(x, Tensor) else x for x in call.inputs)
        sizes = {x.shape[0] if x.dim() else 0 for x in call.inputs if isinstance(x, Tensor)}
        single = len(sizes) != 1 or 0 in sizes
        group = groups.setdefault((call.kind, shapes, call.key if single else None), Group(call.kind))
        group.divisible = not single
        group.calls.append(call)
        group.sizes.append(1 if single else sizes.pop())
    return list(groups.values())


def separate_calls(group: Group) -> list[Group]:
    """Give a group for each call of one whose samples turned out to depend on each other."""
    return [Group(group.kind, [call], [1], divisible=False) for call in group.calls]


class Values:
    """One value of a graph for all samples of all groups.

    Args:
        groups: The groups.
        cache: Where the data are kept.
    """

    def __init__(self, groups: list[Group], cache: ActivationCache) -> None:
        self.groups, self.cache = groups, cache
        self._data: list[Any] = [None] * len(groups)
        self._are_images = [False] * len(groups)
        self._devices: list[Any] = [None] * len(groups)

    def write(self, group: int, rows: slice, value: Any) -> None:
        """Keep a value.

        Args:
            group: Number of the group.
            rows: Samples that it is of.
            value: Tensor whose first dimension is a multiple of the number of samples; or a number, the same for all.
        """
        if not isinstance(value, Tensor) or not value.dim():
            self._data[group] = (value.clone() if isinstance(value, Tensor) else value,)
            return
        count = self.groups[group].count
        if not self.groups[group].divisible:
            rows = slice(0, 1)
        if self._data[group] is None:
            self._are_images[group], self._devices[group] = _are_images(value), value.device
        samples = rows.stop - rows.start
        value = value.detach().reshape(samples, value.shape[0] // samples, *value.shape[1:])
        if self._are_images[group]:
            value = value.movedim(2, -1)
        if self._data[group] is None:
            self._data[group] = self.cache.new((count, *value.shape[1:]), value.dtype, value.device)
        self._data[group][rows].copy_(value)

    def read(self, group: int, which: Tensor | slice) -> Any:
        """Give a copy of some samples.

        Args:
            group: Number of the group.
            which: Their numbers, or a range.

        Returns:
            What was written, on the device it was on; images with their channels last in memory.
        """
        data = self._data[group]
        if not isinstance(data, Tensor):
            return data[0]
        taken = data[which].clone() if isinstance(which, slice) else data.index_select(0, which.to(data.device))
        taken = taken.flatten(0, 1).to(self._devices[group])
        return taken.movedim(-1, 1) if self._are_images[group] else taken

    def free(self) -> None:
        """Give the room back."""
        for data in self._data:
            if isinstance(data, Tensor):
                self.cache.free(data)
        self._data = [None] * len(self.groups)


def _are_images(value: Tensor) -> bool:
    """Tell whether convolutions of a tensor run faster with its channels last in memory (up to 2.7 times on CPU)."""
    return value.dim() == 4 and value.is_floating_point() and value.device.type == 'cpu'


def chunks(group: Group, size: int) -> Iterator[slice]:
    """Yield ranges of at most so many samples, which together are all."""
    for start in range(0, group.count, size):
        yield slice(start, min(start + size, group.count))


Function = Callable[..., 'tuple[Any, ...]']


@torch.no_grad()
def is_divisible(function: Function, inputs: list[Any]) -> bool:
    """Tell whether a function gives each sample what it gives it alone.

    Args:
        function: Gives a tuple of values.
        inputs: Its inputs for a few samples; tensors have them in dimension 0.
    """
    count = next(x.shape[0] for x in inputs if isinstance(x, Tensor))
    together = function(*_copies(inputs, slice(None)))
    if not all(isinstance(t, Tensor) and t.dim() and t.shape[0] % count == 0 for t in together):
        return False
    for i in range(count):
        alone = function(*_copies(inputs, slice(i, i + 1)))
        for one, all_of_them in zip(alone, together):
            rows = all_of_them.shape[0] // count
            mine = all_of_them[i * rows : (i + 1) * rows]
            if one.shape != mine.shape or not _close(one, mine):
                return False
    return True


def _copies(inputs: list[Any], rows: slice) -> list[Any]:
    return [x[rows].clone() if isinstance(x, Tensor) else x for x in inputs]


def _close(one: Tensor, other: Tensor) -> bool:
    """Compare up to rounding, which on a grid can make a whole step of a few values."""
    difference = (one.float() - other.float()).norm()
    return bool(difference <= 0.05 * other.float().norm() + 1e-6)
