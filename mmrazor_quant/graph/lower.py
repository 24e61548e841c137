"""Graphs as they are run: chains of operations replaced by one that does the same with fewer walks over memory.

What is captured, quantized and converted stays as it is; only the function that runs a graph is made of its lowered
copy. The operations of a chain run one by one, with the same results, where the one is not to be had.
"""

from __future__ import annotations

import copy
import operator
from dataclasses import dataclass

import torch
from torch import fx, nn
from torch.fx import Node

from mmrazor_quant.fake_quants import FakeQuantize

from .layers import quantized_layer_norm
from .memory import Memory
from .norm_act import ends_of, layer_norm_act

_ADD_FUNCTIONS = (operator.add, operator.iadd, torch.add)
_ADD_METHODS = ('add', 'add_')


@dataclass(frozen=True)
class _Chain:
    """A layer with its norm, maybe an identity, an addition, an activation, and the quantizer of the result."""

    layer: Node
    identity: Node | None
    addition: Node | None
    act: Node | None
    quantizer: Node

    @property
    def tail(self) -> Node:
        """Node whose result is quantized."""
        return self.act or self.addition or self.identity or self.layer

    @property
    def other(self) -> Node | None:
        """What is added."""
        if self.addition is None:
            return None
        return next(node for node in self.addition.args if node is not (self.identity or self.layer))

    @property
    def has_plain(self) -> bool:
        """Whether the result is read unquantized too."""
        return len(self.tail.users) > 1


def lower(graph: fx.Graph, root: nn.Module) -> fx.Graph:
    """Returns a copy of a graph, to be run.

    Args:
        graph: captured graph with fake quantizers; not changed.
        root: the island's module.
    """
    graph = copy.deepcopy(graph)
    chains = _find_chains(graph, root)
    # All are found before any is replaced: the analysis of memory names the nodes that there were.
    for chain in chains:
        _replace(graph, chain)
    graph.lint()
    return graph


def _find_chains(graph: fx.Graph, root: nn.Module) -> list[_Chain]:
    order = {node: position for position, node in enumerate(graph.nodes)}
    memory = Memory(graph, root)
    chains = [_chain_to(node, root, order) for node in graph.nodes if _is_module(node, root, FakeQuantize)]
    return [chain for chain in chains if chain is not None and _is_safe(chain, memory, graph)]


def _chain_to(quantizer: Node, root: nn.Module, order: dict[Node, int]) -> _Chain | None:
    """Returns the chain that a quantizer ends."""
    tail = quantizer.args[0]
    if not isinstance(tail, Node) or sum(_is_module(user, root, FakeQuantize) for user in tail.users) != 1:
        return None
    act = tail if _is_module(tail, root, nn.Module) and ends_of(root.get_submodule(tail.target)) else None
    node = tail if act is None else act.args[0]
    addition = node if _is_addition(node) else None
    node = node if addition is None else max(addition.args, key=order.__getitem__)
    identity = node if _is_module(node, root, nn.Identity) else None
    layer = node if identity is None else identity.args[0]
    if not _is_layer(layer):
        return None
    chain = _Chain(layer, identity, addition, act, quantizer)
    between = {layer, identity or layer, addition or layer} - {chain.tail}
    return chain if all(len(node.users) == 1 for node in between) else None


def _is_module(node: Node, root: nn.Module, kind: type[nn.Module]) -> bool:
    return node.op == 'call_module' and isinstance(root.get_submodule(node.target), kind)


def _is_layer(node: Node) -> bool:
    if node.op != 'call_function' or node.target is not quantized_layer_norm or len(node.args) != 3:
        return False
    return set(node.kwargs) <= {'bias_input'}


def _is_addition(node: Node) -> bool:
    """Tells whether a node adds two different tensors."""
    is_add = node.op == 'call_function' and node.target in _ADD_FUNCTIONS
    is_add = is_add or node.op == 'call_method' and node.target in _ADD_METHODS
    return is_add and not node.kwargs and len(set(node.args)) == 2 and all(isinstance(a, Node) for a in node.args)


def _is_safe(chain: _Chain, memory: Memory, graph: fx.Graph) -> bool:
    """Tells whether nobody writes to a tensor that would be read earlier or later than now, or kept for backward."""
    last = next(iter(reversed(graph.nodes)))
    moved = [(chain.layer.args[2], chain.layer)]
    if chain.other is not None:
        moved.append((chain.other, chain.addition))
    if any(memory.is_written_between(tensor, since, chain.tail) for tensor, since in moved):
        return False
    return not memory.is_written_between(chain.tail, chain.tail, last)


def _replace(graph: fx.Graph, chain: _Chain) -> None:
    layer, norm, x = chain.layer.args
    has_plain, other = chain.has_plain, chain.other
    with graph.inserting_before(chain.tail):
        modules = (chain.identity, chain.act, chain.quantizer)
        modules = [None if node is None else graph.get_attr(node.target) for node in modules]
        both = graph.call_function(
            layer_norm_act, (layer, norm, *modules, has_plain, x, other), dict(chain.layer.kwargs)
        )
        quantized = graph.call_function(operator.getitem, (both, 0))
        plain = graph.call_function(operator.getitem, (both, 1)) if has_plain else None
    quantized.meta, (plain or quantized).meta = dict(chain.quantizer.meta), dict(chain.tail.meta)
    chain.quantizer.replace_all_uses_with(quantized)
    graph.erase_node(chain.quantizer)
    if plain is not None:
        chain.tail.replace_all_uses_with(plain)
    for node in (chain.act, chain.addition, chain.identity, chain.layer):
        if node is not None:
            graph.erase_node(node)
