"""Finding, in a captured graph, the places where quantization applies."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.fx import Node

from mmrazor_quant.tracing.nodes import node_name, scope_of

from .layers import LAYER_TYPES
from .multihead import linear_rows

FUNCTIONAL_LAYERS = {
    F.linear: 0,
    torch._C._nn.linear: 0,
    linear_rows: 0,
    F.conv1d: 0,
    F.conv2d: 0,
    F.conv3d: 0,
    F.conv_transpose1d: 1,
    F.conv_transpose2d: 1,
    F.conv_transpose3d: 1,
}
"""Functions with an activation as first and a weight as second argument, and the weight's output channel axis."""

MATMUL_FUNCTIONS = {torch.matmul, torch.bmm, torch.mm, operator.matmul}
MATMUL_METHODS = {'matmul', 'bmm', 'mm', '__matmul__', '__rmatmul__'}
ADD_FUNCTIONS = {torch.add, operator.add, operator.iadd}
ADD_METHODS = {'add', 'add_', '__add__', '__radd__', '__iadd__'}

LAYER, FUNCTIONAL, MATMUL, EINSUM, ADD = 'layer', 'functional', 'matmul', 'einsum', 'add'

OTHER = 'other'
"""Operations whose results can be quantized, and whose inputs are not for their own sake."""

OTHER_MODULES = (
    nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Mish, nn.Sigmoid, nn.Tanh,
    nn.Hardsigmoid, nn.Hardswish, nn.Softmax, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.Upsample, nn.LayerNorm,
    nn.GroupNorm, nn.modules.batchnorm._BatchNorm,
)  # fmt: skip
OTHER_CALLS = frozenset({
    'relu', 'relu_', 'relu6', 'hardtanh', 'leaky_relu', 'elu', 'gelu', 'silu', 'mish', 'sigmoid', 'tanh', 'hardsigmoid',
    'hardswish', 'softmax', 'clamp', 'avg_pool2d', 'adaptive_avg_pool2d', 'interpolate', 'layer_norm', 'group_norm',
    'batch_norm', 'mul', 'mul_', 'imul', 'sub', 'sub_', 'isub', 'div', 'truediv', 'cat', 'concat', 'mean',
})  # fmt: skip
"""Names of functions and methods."""

CONCATENATIONS = ('cat', 'concat')


@dataclass(frozen=True)
class Site:
    """One operation whose inputs can be quantized.

    Args:
        node: the operation.
        kind: ``layer`` (a module with a weight), ``functional`` (the same as a function), ``matmul``, ``einsum``,
            ``add``, or ``other``.
        owner: path, below the island, of the module that the operation belongs to: the layer itself, or the module
            in whose forward the function is called.
        ordinal: how many sites of this kind the owner had before, so that ``(owner, kind, ordinal)`` names the call
            site in the same way under either training flag.
        activations: the activation inputs.
        weight: the node of the weight of a ``functional`` (None otherwise).
    """

    node: Node
    kind: str
    owner: str
    ordinal: int
    activations: tuple[Node, ...]
    weight: Node | None = None

    def quantizer_path(self, position: int) -> str:
        """Returns the path of the activation quantizer of an input, below the island."""
        return self._path('input' if self.kind in (LAYER, FUNCTIONAL) else f'{self.kind}_input{position}')

    def weight_quantizer_path(self) -> str:
        """Returns the path of the quantizer of a weight that is computed, below the island."""
        return self._path('weight')

    def result_quantizer_path(self) -> str:
        """Returns the path of the quantizer of the result, below the island."""
        return self._path('output' if self.kind in (LAYER, FUNCTIONAL) else f'{self.kind}_output')

    def _path(self, stem: str) -> str:
        suffix = f'_{self.ordinal}' if self.ordinal else ''
        return f'{self.owner}.{stem}{suffix}_fake_quant'.lstrip('.')


def find_sites(graph: fx.Graph, root: nn.Module) -> list[Site]:
    """Returns the quantizable operations of a graph in execution order.

    Args:
        graph: captured graph (before or after BN folding).
        root: the island's module.
    """
    counts: dict[tuple[str, str], int] = {}
    sites = []
    for node in graph.nodes:
        for kind, owner, activations, weight in _match(node, root):
            # A module and a function may use the same weight: together they number its call sites.
            stem = LAYER if kind == FUNCTIONAL else kind
            ordinal = counts.get((owner, stem), 0)
            counts[owner, stem] = ordinal + 1
            sites.append(Site(node, kind, owner, ordinal, activations, weight))
    return sites


def find_others(graph: fx.Graph, root: nn.Module) -> list[Site]:
    """Returns the other operations that compute tensors of a graph, in execution order; they have no inputs.

    Args:
        graph: captured graph.
        root: the island's module.
    """
    counts: dict[str, int] = {}
    sites = []
    for node in graph.nodes:
        if not _is_other(node, root):
            continue
        owner = node.target if node.op == 'call_module' else scope_of(node)
        ordinal = counts.get(owner, 0)
        counts[owner] = ordinal + 1
        sites.append(Site(node, OTHER, owner, ordinal, ()))
    return sites


def is_concatenation(node: Node) -> bool:
    """Tells whether a node puts tensors together."""
    return node.op == 'call_function' and node_name(node) in CONCATENATIONS


def _is_other(node: Node, root: nn.Module) -> bool:
    # Numbers and lists of indices have fewer dimensions.
    if len(node.meta.get('shape', ())) < 2:
        return False
    if node.op == 'call_module':
        return isinstance(root.get_submodule(node.target), OTHER_MODULES)
    return node.op in ('call_function', 'call_method') and node_name(node) in OTHER_CALLS


def _match(node: Node, root: nn.Module) -> Iterator[tuple[str, str, tuple[Node, ...], Node | None]]:
    if node.op == 'call_module' and isinstance(root.get_submodule(node.target), LAYER_TYPES):
        yield LAYER, node.target, (_first_input(node),), None
    elif node.op == 'call_function' and node.target in FUNCTIONAL_LAYERS:
        activation, weight = argument(node, 0, 'input'), argument(node, 1, 'weight')
        owner = _parameter_owner(weight)
        yield FUNCTIONAL, scope_of(node) if owner is None else owner, (activation,), weight
    elif _is_matmul(node):
        yield MATMUL, scope_of(node), tuple(node.all_input_nodes[:2]), None
    elif node.op == 'call_function' and node.target is torch.einsum:
        yield EINSUM, scope_of(node), tuple(node.all_input_nodes), None
    elif _is_add(node):
        yield ADD, scope_of(node), tuple(node.all_input_nodes), None


def _first_input(node: Node) -> Node:
    return node.all_input_nodes[0]


def argument(node: Node, position: int, name: str) -> Any:
    """Returns an argument of a call, given by position or by name; None for one that is left out."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name)


def _is_matmul(node: Node) -> bool:
    if node.op == 'call_method':
        return node.target in MATMUL_METHODS
    return node.op == 'call_function' and node.target in MATMUL_FUNCTIONS


def _is_add(node: Node) -> bool:
    named = (node.op == 'call_function' and node.target in ADD_FUNCTIONS) or (
        node.op == 'call_method' and node.target in ADD_METHODS
    )
    inputs = node.all_input_nodes
    return named and len(inputs) == 2 and all('shape' in n.meta for n in inputs)


def _parameter_owner(weight: Node) -> str | None:
    """Returns the path of the module whose parameter a node reads, or None for a computed weight."""
    if not isinstance(weight, Node) or weight.op != 'get_attr':
        return None
    return weight.target.rpartition('.')[0]
