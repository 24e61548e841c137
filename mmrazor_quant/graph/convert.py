"""From fake-quantized graphs to graphs with baked weights and explicit quantize and dequantize operations."""

from __future__ import annotations

import copy
import operator
from typing import Any

import torch
from torch import fx, nn
from torch.fx import Node

from mmrazor_quant import ops
from mmrazor_quant.compat import FakeQuantizeBase

from .layers import WEIGHT_QUANTIZER, folded_bias, folded_weight, quantized_layer, quantized_layer_norm

_QUANTIZED_CALLS = (quantized_layer, quantized_layer_norm)


def convert_graph(graph: fx.Graph, root: nn.Module) -> fx.Graph:
    """Returns a copy of a graph that runs plain layers and explicit quantize/dequantize operations.

    Args:
        graph: graph with fake quantizers; not changed.
        root: the island's module; not changed.
    """
    graph = copy.deepcopy(graph)
    for node in list(graph.nodes):
        if node.op == 'call_function' and node.target in _QUANTIZED_CALLS:
            _plain_call(graph, node)
        elif node.op == 'call_module' and isinstance(root.get_submodule(node.target), FakeQuantizeBase):
            _explicit(graph, node, root)
    for node in reversed(list(graph.nodes)):
        if node.op == 'get_attr' and not node.users:
            graph.erase_node(node)
    graph.lint()
    return graph


def _plain_call(graph: fx.Graph, node: Node) -> None:
    skip = 2 if node.target is quantized_layer_norm else 1
    with graph.inserting_before(node):
        new = graph.call_module(node.args[0].target, tuple(node.args[skip:]), dict(node.kwargs))
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    graph.erase_node(node)


def _explicit(graph: fx.Graph, node: Node, root: nn.Module) -> None:
    source = node.args[0]
    if source.op == 'get_attr':  # the weight of a functional layer: baked into the parameter
        node.replace_all_uses_with(source)
        graph.erase_node(node)
        return
    quantizer = root.get_submodule(node.target)
    low, high, axis = quantizer.quant_min, quantizer.quant_max, _axis(quantizer)
    with graph.inserting_before(node):
        scale, zero_point = (graph.get_attr(f'{node.target}.{name}') for name in ('scale', 'zero_point'))
        integers = graph.call_function(ops.quantize, (source, scale, zero_point, low, high, axis))
        real = graph.call_function(ops.dequantize, (integers, scale, zero_point, axis))
    real.meta = dict(node.meta)
    node.replace_all_uses_with(real)
    graph.erase_node(node)


def _axis(quantizer: Any) -> int:
    return getattr(quantizer, 'ch_axis', -1)


@torch.no_grad()
def convert_weights(graphs: list[fx.Graph], root: nn.Module) -> None:
    """Bakes folded and quantized weights into the layers of an island, and removes norms and weight quantizers.

    Args:
        graphs: the graphs with fake quantizers, before :func:`convert_graph`.
        root: the island's module; changed in place.
    """
    for layer_path, norm_path in _quantized_calls(graphs).items():
        layer = root.get_submodule(layer_path)
        if norm_path is not None:
            norm = root.get_submodule(norm_path)
            layer.weight.data, bias = folded_weight(layer, norm), folded_bias(layer, norm)
            layer.bias = nn.Parameter(bias)
            _replace(root, norm_path, nn.Identity())
        layer.weight.data = layer.weight_fake_quant(layer.weight)
        delattr(layer, WEIGHT_QUANTIZER)
    for weight_path, quantizer_path in _quantized_parameters(graphs, root).items():
        weight = operator.attrgetter(weight_path)(root)
        weight.data = root.get_submodule(quantizer_path)(weight)


def _quantized_calls(graphs: list[fx.Graph]) -> dict[str, str | None]:
    calls = {}
    for graph in graphs:
        for node in graph.nodes:
            if node.op == 'call_function' and node.target in _QUANTIZED_CALLS:
                calls[node.args[0].target] = node.args[1].target if node.target is quantized_layer_norm else None
    return calls


def _quantized_parameters(graphs: list[fx.Graph], root: nn.Module) -> dict[str, str]:
    return {
        node.args[0].target: node.target
        for graph in graphs
        for node in graph.nodes
        if node.op == 'call_module'
        and node.args
        and isinstance(node.args[0], Node)
        and node.args[0].op == 'get_attr'
        and isinstance(root.get_submodule(node.target), FakeQuantizeBase)
    }


def _replace(root: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition('.')
    root.get_submodule(parent)._modules[name] = module


__all__ = ['convert_graph', 'convert_weights']
