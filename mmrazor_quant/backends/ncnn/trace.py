"""A network as TorchScript that pnnx can read, with marks where quantizers are."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mmrazor_quant.backends.intermediate import FakeQuantNode

from .marks import make_mark


class _StridedSlices(TorchFunctionMode):
    """Has every second row or column picked by pooling, since ncnn cuts pieces out of images without gaps only."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is Tensor.__getitem__ and args[0].dim() == 4:
            x, index = args
            last = _last_two(index)
            if last is not None:
                return F.max_pool2d(x[..., last[0].start or 0 :, last[1].start or 0 :], 1, [s.step or 1 for s in last])
        return func(*args, **(kwargs or {}))


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
def trace(network: nn.Module, images: Tensor) -> tuple[torch.jit.ScriptModule, list[str]]:
    """Traces a network in which each quantizer of activations is a mark.

    Args:
        network: network with :class:`FakeQuantNode` modules; left as it is.
        images: example images, batch size 1.

    Returns:
        The TorchScript, and the paths of the quantizers by the numbers of their marks.
    """
    network = copy.deepcopy(network)
    paths = [path for path, module in network.named_modules() if isinstance(module, FakeQuantNode)]
    for number, path in enumerate(paths):
        parent, _, name = path.rpartition('.')
        network.get_submodule(parent)._modules[name] = make_mark(number)
    with warnings.catch_warnings(), _StridedSlices():
        warnings.simplefilter('ignore', torch.jit.TracerWarning)
        warnings.simplefilter('ignore', DeprecationWarning)
        return torch.jit.trace(network, (images,), check_trace=False), paths
