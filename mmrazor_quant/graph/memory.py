"""Which nodes of a graph are the same memory, and where it is written to."""

from __future__ import annotations

import operator
from collections import defaultdict

from torch import fx, nn
from torch.fx import Node

_VIEWS = frozenset(
    {
        'alias', 'broadcast_to', 'chunk', 'contiguous', 'detach', 'diagonal', 'dropout', 'dsplit', 'expand',
        'expand_as', 'flatten', 'float', 'getattr', 'getitem', 'hsplit', 'movedim', 'narrow', 'permute', 'ravel',
        'real', 'reshape', 'reshape_as', 'select', 'split', 'squeeze', 'swapaxes', 'swapdims', 't', 'tensor_split',
        'to', 'transpose', 'type', 'type_as', 'unbind', 'unflatten', 'unfold', 'unsqueeze', 'view', 'view_as', 'vsplit',
    }
)  # fmt: skip
"""Functions and methods whose result may be their first argument's memory."""

_VIEW_MODULES = (nn.Identity, nn.modules.dropout._DropoutNd, nn.Flatten, nn.Unflatten)

_IN_PLACE_OPERATORS = frozenset(
    {'iadd', 'iand', 'ifloordiv', 'ilshift', 'imatmul', 'imod', 'imul', 'ior', 'ipow', 'irshift', 'isub', 'itruediv',
     'ixor', 'setitem'}
)  # fmt: skip


class Memory:
    """The memory of a graph's tensors.

    Args:
        graph: captured graph.
        root: the island's module.
    """

    def __init__(self, graph: fx.Graph, root: nn.Module) -> None:
        self._root = root
        self._position: dict[Node, int] = {}
        self._owner: dict[Node, Node] = {}
        self._writes: dict[Node, list[int]] = defaultdict(list)
        for position, node in enumerate(graph.nodes):
            self._position[node] = position
            written = self._written(node)
            source = written if written is not None else self._viewed(node)
            self._owner[node] = node if source is None else self._owner[source]
            if written is not None:
                self._writes[self._owner[written]].append(position)

    def is_written_between(self, tensor: Node, first: Node, last: Node) -> bool:
        """Tells whether the memory of ``tensor`` is written to after node ``first`` and before node ``last``."""
        start, end = self._position[first], self._position[last]
        return any(start < position < end for position in self._writes[self._owner[tensor]])

    def _written(self, node: Node) -> Node | None:
        """Returns the node whose memory a node writes to."""
        out = node.kwargs.get('out')
        if isinstance(out, Node):
            return out
        return _first(node) if self._is_in_place(node) else None

    def _is_in_place(self, node: Node) -> bool:
        if node.op == 'call_module':
            return bool(getattr(self._root.get_submodule(node.target), 'inplace', False))
        if node.op not in ('call_function', 'call_method'):
            return False
        name = _name(node)
        plain = name.strip('_')
        return bool(node.kwargs.get('inplace', False)) or plain in _IN_PLACE_OPERATORS or _ends_in_one_underscore(name)

    def _viewed(self, node: Node) -> Node | None:
        """Returns the node whose memory the result of a node may be."""
        if node.op == 'call_module':
            return _first(node) if isinstance(self._root.get_submodule(node.target), _VIEW_MODULES) else None
        if node.op in ('call_function', 'call_method') and _name(node) in _VIEWS:
            return _first(node)
        return None


def _first(node: Node) -> Node | None:
    first = node.args[0] if node.args else node.kwargs.get('input')
    return first if isinstance(first, Node) else None


def _name(node: Node) -> str:
    if node.target is operator.getitem:
        return 'getitem'
    return node.target if isinstance(node.target, str) else getattr(node.target, '__name__', '')


def _ends_in_one_underscore(name: str) -> bool:
    return name.endswith('_') and not name.endswith('__')
