"""A network as TorchScript that pnnx can read, with marks where quantizers are."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mmrazor_quant.backends.intermediate import FakeQuantNode

from .marks import make_mark


class _StridedSlices(TorchFunctionMode):
    """Writes what picks every n-th row or column as pooling: ncnn cuts out pieces without gaps only.

    Args:
        any_size: whether images may have any size.
    """

    def __init__(self, any_size: bool) -> None:
        super().__init__()
        self.any_size = any_size

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        last = _last_two(args[1]) if func is Tensor.__getitem__ and args[0].dim() == 4 else None
        if last is None:
            return func(*args, **(kwargs or {}))
        starts, steps = [part.start or 0 for part in last], [part.step or 1 for part in last]
        return (_pick_by_kernel if self.any_size else _pick)(args[0], starts, steps)


def _pick(x: Tensor, starts: list[int], steps: list[int]) -> Tensor:
    return F.max_pool2d(x[..., starts[0] :, starts[1] :], 1, steps)


def _pick_by_kernel(x: Tensor, starts: list[int], steps: list[int]) -> Tensor:
    """Picks with a kernel of zeros and a one: where sizes are free, pnnx takes cutting out for doing nothing."""
    kernel = np.zeros((int(x.shape[1]), 1, starts[0] + 1, starts[1] + 1), np.float32)
    kernel[..., -1, -1] = 1
    return F.conv2d(x, torch.from_numpy(kernel), stride=steps, groups=len(kernel))


def _last_two(index: Any) -> tuple[slice, slice] | None:
    """Returns the slices of rows and columns of an index that takes every n-th of them, up to the end."""
    if not isinstance(index, tuple) or len(index) < 2:
        return None
    *others, rows, columns = index
    is_whole = all(other is Ellipsis or other == slice(None) for other in others)
    is_short = len(index) == 4 or (len(others) == 1 and others[0] is Ellipsis)
    if not is_whole or not is_short or not all(_runs_to_the_end(part) for part in (rows, columns)):
        return None
    return (rows, columns) if any((part.step or 1) > 1 for part in (rows, columns)) else None


def _runs_to_the_end(part: Any) -> bool:
    return isinstance(part, slice) and part.stop is None and isinstance(part.start or 0, int) and (part.start or 0) >= 0


@torch.no_grad()
def trace(network: nn.Module, images: Tensor, any_size: bool = False) -> tuple[torch.jit.ScriptModule, list[str]]:
    """Traces a network in which each quantizer of activations is a mark.

    Args:
        network: network with :class:`FakeQuantNode` modules; left as it is.
        images: example images, batch size 1.
        any_size: whether images may have any size.

    Returns:
        The TorchScript, and the paths of the quantizers by the numbers of their marks.
    """
    network = copy.deepcopy(network)
    paths = [path for path, module in network.named_modules() if isinstance(module, FakeQuantNode)]
    for number, path in enumerate(paths):
        parent, _, name = path.rpartition('.')
        network.get_submodule(parent)._modules[name] = make_mark(number)
    with warnings.catch_warnings(), _StridedSlices(any_size):
        warnings.simplefilter('ignore', torch.jit.TracerWarning)
        warnings.simplefilter('ignore', DeprecationWarning)
        return torch.jit.trace(network, (images,), check_trace=False), paths
