"""Views of tensors that elementwise code can run over, whatever their memory format."""

from __future__ import annotations

import torch
from torch import Tensor


def is_plain(x: Tensor) -> bool:
    """Tell whether a tensor is data in memory, and not one that stands for others while code is traced or mapped."""
    return (
        type(x) in (Tensor, torch.nn.Parameter)
        and not torch.jit.is_tracing()
        and not torch.compiler.is_compiling()
        and not torch._C._functorch.is_functorch_wrapped_tensor(x)
    )


def is_dense(x: Tensor) -> bool:
    """Tell whether a tensor fills its memory without holes or overlaps, in whatever order of dimensions.

    Args:
        x: Any strided tensor.

    Returns:
        True for contiguous, channels-last and permuted tensors; False for slices with gaps and expanded tensors.
    """
    if x.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(x.stride(), x.shape)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True


def flat_view(x: Tensor) -> Tensor:
    """View all elements in one dimension, in memory order; copies only where the memory has holes.

    Args:
        x: Tensor of any shape.

    Returns:
        Shape [numel].
    """
    if x.is_contiguous() or not is_dense(x):
        return x.reshape(-1)
    return x.as_strided((x.numel(),), (1,))


def channel_view(x: Tensor, ch_axis: int) -> Tensor:
    """View a dense tensor in memory order, with as few dimensions as one for the channels allows.

    Args:
        x: Dense tensor with more than one channel.
        ch_axis: Dimension of the channels.

    Returns:
        Shape [C, inner], [outer, C] or [outer, C, inner], contiguous.
    """
    channels, inner = x.shape[ch_axis], x.stride(ch_axis)
    outer = x.numel() // (channels * inner)
    if inner == 1:
        return x.as_strided((outer, channels), (channels, 1))
    if outer == 1:
        return x.as_strided((channels, inner), (inner, 1))
    return x.as_strided((outer, channels, inner), (channels * inner, inner, 1))


def channel_rows(x: Tensor, ch_axis: int) -> Tensor:
    """Arrange a tensor as one row of values per channel.

    Args:
        x: Tensor of any shape.
        ch_axis: Dimension of the channels; -1: the whole tensor is one row.

    Returns:
        Shape [C, numel / C]; a view where the memory layout allows. The order within a row is unspecified.
    """
    if ch_axis == -1:
        return flat_view(x).unsqueeze(0)
    return x.movedim(ch_axis, 0).flatten(1) if x.dim() > 1 else x.reshape(-1, 1)
