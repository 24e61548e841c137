"""Reductions over the processes of a distributed run. Results are new tensors, the same on all processes."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def reduce_extremes(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Give the elementwise minimum of lower and maximum of upper ends, in one reduction.

    Args:
        low: Lower ends of this process, any shape; +inf says that there are none.
        high: Upper ends, the same shape; -inf says that there are none.

    Returns:
        Lower and upper ends, float32; (-inf, inf) where a process has NaN, which a maximum of its own may pass over.
    """
    infinity = float('inf')
    ends = torch.stack([-low, high]).to(torch.float32).nan_to_num_(infinity, infinity, -infinity)
    dist.all_reduce(ends, dist.ReduceOp.MAX)
    return -ends[0], ends[1]


def reduce_sum(x: Tensor) -> Tensor:
    """Give the elementwise sum over processes.

    Args:
        x: Summands of this process, any shape.

    Returns:
        The sum, in shape and type of ``x``.
    """
    x = x.clone()
    dist.all_reduce(x, dist.ReduceOp.SUM)
    return x
