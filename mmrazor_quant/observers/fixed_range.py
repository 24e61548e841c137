"""A range known beforehand."""

from __future__ import annotations

from torch import Tensor

from mmrazor_quant.arguments import check_choice, check_number
from mmrazor_quant.registry import MODELS

from .base import RangeObserver

RANGES = {'sigmoid': (0.0, 1.0), 'softmax': (0.0, 1.0), 'tanh': (-1.0, 1.0)}
"""Ranges of functions."""


@MODELS.register_module()
class FixedRangeObserver(RangeObserver):
    """A range known beforehand, such as that of a sigmoid's output. No data are needed, and none change it.

    Args:
        *args: See :class:`RangeObserver`.
        function: Function whose range it is: ``'sigmoid'``, ``'softmax'`` or ``'tanh'``. Otherwise give both ends:
        min_val: Lower end.
        max_val: Upper end.
        **kwargs: See :class:`RangeObserver`.

    Raises:
        ValueError: Neither a function nor both ends, both of these, or ends that are no range.
    """

    min_val: Tensor
    max_val: Tensor

    def __init__(
        self,
        *args,
        function: str | None = None,
        min_val: float | None = None,
        max_val: float | None = None,
        **kwargs,
    ) -> None:
        super().__init__(*args, **kwargs)
        low, high = _range_of(function, min_val, max_val)
        # As initial values they are what resetting and a new number of channels give.
        self.register_statistic('min_val', low)
        self.register_statistic('max_val', high)

    def update(self, x: Tensor) -> None:
        """Leave the range as it is."""

    def observed_range(self) -> tuple[Tensor, Tensor]:
        """Give the range, each end of shape [C]."""
        return self.min_val, self.max_val


def _range_of(function: str | None, min_val: float | None, max_val: float | None) -> tuple[float, float]:
    """Give the ends that the arguments stand for, or raise a ValueError that names the wrong one."""
    ends = {'min_val': min_val, 'max_val': max_val}
    if function is None:
        for name, value in ends.items():
            check_number(name, value, lambda v: True, 'finite numbers, or a function instead of both ends')
        if min_val > max_val:
            raise ValueError(f'min_val: got {min_val!r}, allowed: numbers up to max_val, which is {max_val!r}')
        return float(min_val), float(max_val)
    check_choice('function', function, RANGES)
    for name, value in ends.items():
        if value is not None:
            raise ValueError(f'{name}: got {value!r} with function={function!r}, allowed: only one of the two')
    return RANGES[function]
