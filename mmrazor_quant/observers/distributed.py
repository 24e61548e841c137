"""Agreement between the processes of a distributed run. In a single process each function returns its input.

Results are new tensors: statistics stay those of their process, so that reducing twice counts nothing twice.
"""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _all_reduce(x: Tensor, op: str) -> Tensor:
    if world_size() == 1:
        return x
    x = x.clone()
    dist.all_reduce(x, getattr(dist.ReduceOp, op))
    return x


def reduce_min(x: Tensor) -> Tensor:
    """Elementwise minimum over processes."""
    return _all_reduce(x, 'MIN')


def reduce_max(x: Tensor) -> Tensor:
    """Elementwise maximum over processes."""
    return _all_reduce(x, 'MAX')


def reduce_sum(x: Tensor) -> Tensor:
    """Elementwise sum over processes."""
    return _all_reduce(x, 'SUM')


def reduce_weighted_mean(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Elementwise weighted mean over processes.

    Args:
        x: Values.
        weight: Weights of this process, the shape of ``x``.

    Returns:
        The mean (``x`` where all weights are 0) and the sum of the weights.
    """
    if world_size() == 1:
        return x, weight
    total = reduce_sum(weight)
    mean = reduce_sum(x * weight) / total.clamp(min=1e-30)
    return mean.where(total > 0, x), total
