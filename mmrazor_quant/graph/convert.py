"""From fake-quantized graphs to graphs with baked weights and explicit quantize and dequantize operations."""

from __future__ import annotations

import copy
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx import Node
from torch.nn.utils import parametrize

from mmrazor_quant import ops
from mmrazor_quant.compat import FakeQuantizeBase

from .layers import WEIGHT_QUANTIZER, folded_bias, folded_weight, quantized_layer, quantized_layer_norm

_QUANTIZED_CALLS = (quantized_layer, quantized_layer_norm)


def baked_parameters(graphs: list[fx.Graph], root: nn.Module) -> dict[str, str]:
    """Returns the parameters that can be replaced by what their quantizer makes of them, and the quantizers' paths.

    These are the ones that nothing but one quantizer reads.

    Args:
        graphs: all graphs with fake quantizers of an island.
        root: the island's module.
    """
    readers: dict[str, set[str | None]] = defaultdict(set)
    for graph in graphs:
        for node in graph.nodes:
            if node.op == 'get_attr':
                readers[node.target] |= {user.target if _is_quantizer(user, root) else None for user in node.users}
    single = {weight: next(iter(found)) for weight, found in readers.items() if len(found) == 1}
    return {weight: quantizer for weight, quantizer in single.items() if quantizer is not None}


def convert_graph(graph: fx.Graph, root: nn.Module, baked: dict[str, str]) -> fx.Graph:
    """Returns a copy of a graph that runs plain layers and explicit quantize/dequantize operations.

    Args:
        graph: graph with fake quantizers; not changed.
        root: the island's module; not changed.
        baked: what :func:`baked_parameters` returned.
    """
    graph = copy.deepcopy(graph)
    for node in list(graph.nodes):
        if node.op == 'call_function' and node.target in _QUANTIZED_CALLS:
            _plain_call(graph, node)
        elif _is_quantizer(node, root):
            _explicit(graph, node, root, baked)
    for node in reversed(list(graph.nodes)):
        if node.op == 'get_attr' and not node.users:
            graph.erase_node(node)
    graph.lint()
    return graph


def _is_quantizer(node: Node, root: nn.Module) -> bool:
    return node.op == 'call_module' and isinstance(root.get_submodule(node.target), FakeQuantizeBase)


def _plain_call(graph: fx.Graph, node: Node) -> None:
    skip = 2 if node.target is quantized_layer_norm else 1
    with graph.inserting_before(node):
        new = graph.call_module(node.args[0].target, tuple(node.args[skip:]), dict(node.kwargs))
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    graph.erase_node(node)


def _explicit(graph: fx.Graph, node: Node, root: nn.Module, baked: dict[str, str]) -> None:
    source = node.args[0]
    if source.op == 'get_attr' and baked.get(source.target) == node.target:
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
def convert_weights(graphs: list[fx.Graph], root: nn.Module, baked: dict[str, str]) -> None:
    """Bakes folded and quantized weights into the layers of an island, and removes norms and weight quantizers.

    Args:
        graphs: the graphs with fake quantizers, before :func:`convert_graph`.
        root: the island's module; changed in place.
        baked: what :func:`baked_parameters` returned.
    """
    calls = _quantized_calls(graphs)
    for layer_path, norm_path in calls.items():
        _bake_layer(root, layer_path, norm_path)
    for weight_path, quantizer_path in baked.items():
        owner_path, _, name = weight_path.rpartition('.')
        if owner_path not in calls:
            owner = root.get_submodule(owner_path)
            _set_parameter(owner, name, root.get_submodule(quantizer_path)(getattr(owner, name)))
    for layer_path in calls:
        root.get_submodule(layer_path)._modules.pop(WEIGHT_QUANTIZER, None)


def _bake_layer(root: nn.Module, layer_path: str, norm_path: str | None) -> None:
    layer = root.get_submodule(layer_path)
    if not hasattr(layer, WEIGHT_QUANTIZER):  # baked before: it is part of another island too
        return
    weight = layer.weight
    if norm_path is not None:
        norm = root.get_submodule(norm_path)
        weight = folded_weight(layer, norm)
        layer.bias = nn.Parameter(folded_bias(layer, norm))
        _replace(root, norm_path, nn.Identity())
    _set_parameter(layer, 'weight', layer.weight_fake_quant(weight))


def _set_parameter(owner: nn.Module, name: str, value: Tensor) -> None:
    """Gives a module a tensor of its own: the old one may be shared with others, or computed."""
    if parametrize.is_parametrized(owner, name):
        _drop_parametrizations(owner)
    if name in owner._buffers:
        owner._buffers[name] = value
    else:
        setattr(owner, name, nn.Parameter(value))


def _drop_parametrizations(owner: nn.Module) -> None:
    """Makes plain parameters of computed ones (torch's own function would do so to the module this is a copy of)."""
    values = {name: getattr(owner, name) for name in owner.parametrizations}
    owner.__class__ = parametrize.type_before_parametrizations(owner)
    del owner.parametrizations
    for name, value in values.items():
        owner.register_parameter(name, nn.Parameter(value))


def _quantized_calls(graphs: list[fx.Graph]) -> dict[str, str | None]:
    calls = {}
    for graph in graphs:
        for node in graph.nodes:
            if node.op == 'call_function' and node.target in _QUANTIZED_CALLS:
                calls[node.args[0].target] = node.args[1].target if node.target is quantized_layer_norm else None
    return calls


def _replace(root: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition('.')
    root.get_submodule(parent)._modules[name] = module


__all__ = ['baked_parameters', 'convert_graph', 'convert_weights']
