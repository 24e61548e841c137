"""Which values are computed from what tensors hold, rather than from their shapes and types."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch.fx import Node

from .nested import is_number, leaves
from .nodes import AutogradCall, node_name

READS_DATA = {'__bool__', '__int__', '__float__', '__index__', '__complex__', '__contains__', '__array__', 'numpy'}
_SIZE_FROM_DATA = {'nonzero', 'argwhere', 'masked_select', 'unique', 'unique_consecutive', 'bincount', 'item', 'tolist'}
LENGTH_FROM_SIZE = {'unbind', 'split', 'chunk', 'tensor_split', 'hsplit', 'vsplit', 'dsplit', 'unsafe_chunk'}
_FACTORIES = {
    'arange',
    'range',
    'linspace',
    'logspace',
    'eye',
    'zeros',
    'ones',
    'empty',
    'full',
    'rand',
    'randn',
    'randint',
}
_METADATA = {
    *('size', 'dim', 'numel', 'nelement', 'stride', 'storage_offset', 'element_size', 'get_device', 'len'),
    *('is_floating_point', 'is_complex', 'is_signed', 'is_contiguous', 'is_same_size', 'is_pinned', 'is_inference'),
    *('is_tensor', 'is_storage', 'result_type', 'can_cast', 'is_conj', 'is_neg', 'is_shared'),
}


def depends_on_data(node: Node, value: Any, values: dict[Node, Any]) -> bool:
    """Tells whether the Python value of a node, or the shape of the tensor it is, was computed from tensor data.

    Args:
        node: the node, whose inputs do not depend on data.
        value: its value on the example.
        values: the values of its inputs.
    """
    if node.op not in ('call_function', 'call_method'):
        return False
    name = node_name(node)
    if name in _SIZE_FROM_DATA or _sizes_follow_data(node, value, values):
        return True
    # A number or bool computed from a tensor by anything but its metadata was read from the data.
    metadata = node.target is getattr or name in _METADATA
    reads_tensor = any(isinstance(values.get(arg), torch.Tensor) for arg in node.all_input_nodes)
    return reads_tensor and not metadata and is_number(value)


def _sizes_follow_data(node: Node, value: Any, values: dict[Node, Any]) -> bool:
    """Tells whether the shape of what an operation returns depends on what its tensors hold."""
    arguments = (*node.args[1:], *node.kwargs.values())
    tensors = [values[n] for n in leaves(arguments) if isinstance(n, Node) and isinstance(values.get(n), torch.Tensor)]
    if node.target is operator.getitem:
        slices = [part for part in pytree.tree_leaves(node.args[1]) if isinstance(part, slice)]
        bounds = [values.get(n) for n in leaves(slices) if isinstance(n, Node)]
        masks = any(t.dtype in (torch.bool, torch.uint8) for t in tensors)
        return masks or any(isinstance(bound, torch.Tensor) for bound in bounds)
    if isinstance(node.target, AutogradCall):
        # Operations that return indices (non-maximum suppression) return as many as they find.
        outputs = [t for t in pytree.tree_leaves(value) if isinstance(t, torch.Tensor)]
        return any(not t.dtype.is_floating_point for t in outputs)
    name = node_name(node)
    if name in _FACTORIES:
        return any(isinstance(values.get(n), torch.Tensor) for n in node.all_input_nodes)
    if name == 'repeat_interleave':
        return bool(tensors)
    if name == 'one_hot':
        classes = node.args[1] if len(node.args) > 1 else node.kwargs.get('num_classes', -1)
        return classes == -1
    return name == 'where' and not arguments
