"""Operations through which a positive factor of a channel passes unchanged: f(s x) = s f(x)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Node

from mmrazor_quant.compat import FakeQuantizeBase

_ELEMENTWISE_MODULES = (
    nn.Identity, nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d
)  # fmt: skip
_ELEMENTWISE_FUNCTIONS = frozenset(
    {torch.relu, torch.relu_, F.relu, F.relu_, F.leaky_relu, F.leaky_relu_, F.prelu, F.dropout}
)
_ELEMENTWISE_METHODS = frozenset({'relu', 'relu_', 'contiguous'})

_POOLING_MODULES = (
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d,
    nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d,
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
)  # fmt: skip
_POOLING_FUNCTIONS = frozenset(
    {
        F.max_pool1d, F.max_pool2d, F.max_pool3d, F.avg_pool1d, F.avg_pool2d, F.avg_pool3d, F.adaptive_max_pool1d,
        F.adaptive_max_pool2d, F.adaptive_max_pool3d, F.adaptive_avg_pool1d, F.adaptive_avg_pool2d,
        F.adaptive_avg_pool3d, torch.max_pool1d, torch.max_pool2d, torch.max_pool3d,
    }
)  # fmt: skip

# A subclass with a forward of its own may compute anything.
_ELEMENTWISE_FORWARDS = frozenset(kind.forward for kind in _ELEMENTWISE_MODULES)
_POOLING_FORWARDS = frozenset(kind.forward for kind in _POOLING_MODULES)

_FLATTEN_FUNCTIONS = frozenset({torch.flatten, torch.reshape})
_FLATTEN_METHODS = frozenset({'flatten', 'view', 'reshape'})

_SIZE_METHODS = frozenset({'size', 'dim', 'numel'})
_SIZE_ATTRIBUTES = frozenset({'shape', 'ndim', 'device', 'dtype'})


def is_homogeneous(node: Node, root: nn.Module, axis: int | None) -> bool:
    """Tells whether an operation works channel by channel and lets a positive factor pass.

    A fake quantizer is one, too: whoever scales the channels of what it sees has it calibrated afterwards.

    Args:
        node: node that reads one tensor, with shapes in its metadata.
        root: the island's module.
        axis: dimension of the channels.
    """
    forward = type(root.get_submodule(node.target)).forward if node.op == 'call_module' else None
    if forward in _ELEMENTWISE_FORWARDS or _is_call(node, _ELEMENTWISE_FUNCTIONS, _ELEMENTWISE_METHODS):
        return True
    if forward in _POOLING_FORWARDS or _is_call(node, _POOLING_FUNCTIONS, frozenset()):
        return axis == 1 and len(node.all_input_nodes[0].meta.get('shape', ())) > 2
    return node.op == 'call_module' and isinstance(root.get_submodule(node.target), FakeQuantizeBase)


def is_flatten(node: Node, root: nn.Module) -> bool:
    """Tells whether an operation lays all dimensions behind the first out as one.

    Args:
        node: node that reads one tensor, with shapes in its metadata.
        root: the island's module.
    """
    named = _is_call(node, _FLATTEN_FUNCTIONS, _FLATTEN_METHODS) or (
        node.op == 'call_module' and type(root.get_submodule(node.target)).forward is nn.Flatten.forward
    )
    source = node.all_input_nodes[0]
    before, after = source.meta.get('shape'), node.meta.get('shape')
    if not named or before is None or after is None or len(before) < 2:
        return False
    return len(after) == 2 and after[0] == before[0]


def reads_size_only(node: Node) -> bool:
    """Tells whether an operation asks for a tensor's size or type, not for its values."""
    if node.op == 'call_method':
        return node.target in _SIZE_METHODS
    return node.op == 'call_function' and node.target is getattr and node.args[1] in _SIZE_ATTRIBUTES


def _is_call(node: Node, functions: frozenset, methods: frozenset) -> bool:
    if node.op == 'call_function':
        return node.target in functions
    return node.op == 'call_method' and node.target in methods
