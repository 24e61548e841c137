"""What the nodes of a graph with fake quantizers are: layers, quantizers of activations, sizes, what needs no layer."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import fx, nn
from torch.fx import Node

from mmrazor_quant.compat import FakeQuantizeBase
from mmrazor_quant.tracing.nodes import check_size, node_name

from .calls import MODULES_READ
from .layers import WEIGHT_QUANTIZER
from .sites import FUNCTIONAL_LAYERS, MATMUL_FUNCTIONS, MATMUL_METHODS, argument

_SIZES = frozenset({'size', 'dim', 'numel', 'ndimension', 'getattr', 'len', 'stride'})
"""Functions and methods that ask a tensor for something other than its data, unless the result is a tensor."""


class Roles:
    """The parts that the nodes of a graph play.

    Free nodes are those that any piece of the graph may compute for itself, because they cost little and depend on no
    layer: parameters, fake quantizers, sizes, and what is computed from the inputs before the first layer.

    Args:
        graph: graph with fake quantizers.
        root: the island's module.
    """

    def __init__(self, graph: fx.Graph, root: nn.Module) -> None:
        self.graph, self.root = graph, root
        self.free: set[Node] = set()
        for node in graph.nodes:
            if self._is_free(node):
                self.free.add(node)

    def _is_free(self, node: Node) -> bool:
        if node.op in ('placeholder', 'output'):
            return False
        if node.op == 'get_attr' or self.is_quantizer(node) or self._is_size(node):
            return True
        return not self.is_operation(node) and all(map(self._is_of_inputs, node.all_input_nodes))

    def _is_of_inputs(self, node: Node) -> bool:
        """Tells whether a value is an input or free, its quantizer aside: a quantizer is free whatever it reads."""
        if self.is_quantizer(node):
            return all(map(self._is_of_inputs, node.all_input_nodes))
        return node in self.free or node.op == 'placeholder'

    def _is_size(self, node: Node) -> bool:
        if 'shape' in node.meta or node.op not in ('call_function', 'call_method'):
            return False
        inputs = node.all_input_nodes
        asks = node_name(node) in _SIZES or node.target is check_size
        return asks or (bool(inputs) and all(n in self.free and self._is_size(n) for n in inputs))

    @functools.cache  # noqa: B019  lives as long as the graph is looked at
    def is_quantizer(self, node: Node) -> bool:
        """Tells whether a node calls a fake quantizer."""
        return node.op == 'call_module' and isinstance(self.root.get_submodule(node.target), FakeQuantizeBase)

    def is_operation(self, node: Node) -> bool:
        """Tells whether a node is a layer with a quantized weight, or a product of activations."""
        return self.weight_quantizer(node) is not None or self._is_product(node)

    def _is_product(self, node: Node) -> bool:
        named = node.target in (MATMUL_METHODS if node.op == 'call_method' else MATMUL_FUNCTIONS | {torch.einsum})
        return named and any(self.is_quantizer(n) for n in node.all_input_nodes)

    def weight_quantizer(self, node: Node) -> str | None:
        """Returns the path, below the island, of the quantizer of a layer's weight; None for any other node."""
        if node.op != 'call_function':
            return None
        if node.target in MODULES_READ:
            return f'{node.args[0].target}.{WEIGHT_QUANTIZER}'.lstrip('.')
        if node.target in FUNCTIONAL_LAYERS:
            weight = argument(node, 1, 'weight')
            if isinstance(weight, Node) and self.is_quantizer(weight):
                return weight.target
        return None

    def owner(self, node: Node) -> str:
        """Returns the path of the module that a layer is, or in whose forward a node is called."""
        if node.target in MODULES_READ:
            return node.args[0].target
        stack = node.meta.get('nn_module_stack')
        return next(reversed(stack.values()))[0] if stack else ''

    def sources(self, node: Node) -> Iterator[Node]:
        """Yields the values that a node is computed from, looking through fake quantizers, without free ones."""
        for source in node.all_input_nodes:
            if self.is_quantizer(source):
                yield from self.sources(source)
            elif source not in self.free:
                yield source
