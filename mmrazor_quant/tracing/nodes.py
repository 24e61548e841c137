"""What captured graphs hold beside torch's own operations: guards, autograd functions, extras of a module."""

from __future__ import annotations

import operator
from typing import Any

from torch import fx, nn
from torch.fx import Node

from mmrazor_quant.compat import CPU_FALLBACKS

from .errors import SizeMismatchError

EXTRAS = 'traced_extras'
"""Name of the child of a captured module that holds what the graph needs and the module does not have."""


def check_size(value: Any, expected: Any) -> None:
    """Raises SizeMismatchError unless a value has what it had when the graph was traced."""
    if value != expected:
        raise SizeMismatchError(f'{value} instead of {expected}')


def has_guards(graph: fx.Graph) -> bool:
    """Tells whether a graph holds for some input sizes only."""
    return any(node.op == 'call_function' and node.target is check_size for node in graph.nodes)


def without_guards(graph: fx.Graph) -> fx.Graph:
    """Returns a copy of a graph without guards and the comparisons made for them."""
    bare = fx.Graph()
    output = bare.graph_copy(graph, {})
    bare.output(output)
    for node in reversed(list(bare.nodes)):
        is_guard = node.op == 'call_function' and node.target is check_size
        if is_guard or (not node.users and node.op == 'call_function' and node.target in _COMPARISONS):
            bare.erase_node(node)
    return bare


_COMPARISONS = (operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge)


def node_name(node: Node) -> str:
    """Returns the name of the function or method that a node calls."""
    return node.target if isinstance(node.target, str) else getattr(node.target, '__name__', '')


def scope_of(node: Node) -> str:
    """Returns the path of the module in whose forward a function was called."""
    stack = node.meta.get('nn_module_stack')
    return next(reversed(stack.values()))[0] if stack else ''


def custom_operation(node: Node) -> str | None:
    """Returns the name of an operation of another library than torch that a node calls; None for any other node."""
    if node.op != 'call_function':
        return None
    if isinstance(node.target, AutogradCall):
        return node.target.__name__
    is_fallback = (getattr(node.target, '__module__', ''), node_name(node)) in CPU_FALLBACKS
    return node_name(node) if is_fallback else None


class AutogradCall:
    """The node target of a custom autograd function, whose own backward is kept."""

    def __init__(self, function: type) -> None:
        self.function = function
        self.__name__ = function.__name__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function.apply(*args, **kwargs)


def extras_of(root: nn.Module) -> nn.Module:
    """Returns the child of a module that holds what its graph needs and it does not have."""
    if EXTRAS not in root._modules:
        root.add_module(EXTRAS, nn.Module())
    return root._modules[EXTRAS]
