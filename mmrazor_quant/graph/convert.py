"""From fake-quantized graphs to graphs with baked weights and explicit quantize and dequantize operations."""

from __future__ import annotations

import copy
import functools
import warnings
from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.fx import Node
from torch.nn.utils import parametrize

from mmrazor_quant.compat import FakeQuantizeBase
from mmrazor_quant.fake_quants import DoReFaFakeQuantize, FakeQuantize

from .bias import quantized_bias, rounded_bias
from .calls import MODULES_READ
from .layers import WEIGHT_QUANTIZER, folded_bias, folded_weight


@dataclass
class _LayerCalls:
    """All calls of one layer in an island: the path of its batch norm, and of the quantizers that biases go by.

    ``bias_is_read`` tells whether something else reads the bias.
    """

    norm: str | None
    bias_inputs: set[str | None]
    bias_is_read: bool = False


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


def convert_graph(graph: fx.Graph, root: nn.Module, baked: dict[str, str], explicit: bool = True) -> fx.Graph:
    """Returns a copy of a graph that runs plain layers and explicit quantize/dequantize operations.

    Args:
        graph: graph with fake quantizers; not changed.
        root: the island's module; not changed.
        baked: what :func:`baked_parameters` returned.
        explicit: whether there are explicit operations; otherwise the activation quantizers stay modules.
    """
    graph = copy.deepcopy(graph)
    for node in list(graph.nodes):
        if node.op == 'call_function' and node.target in MODULES_READ:
            _plain_call(graph, node)
        elif node.op == 'call_function' and node.target is quantized_bias:
            _explicit_bias(graph, node)
        elif _is_quantizer(node, root):
            _explicit(graph, node, root, baked, explicit)
    for node in reversed(list(graph.nodes)):
        if node.op == 'get_attr' and not node.users:
            graph.erase_node(node)
    graph.lint()
    return graph


def _is_quantizer(node: Node, root: nn.Module) -> bool:
    return node.op == 'call_module' and isinstance(root.get_submodule(node.target), FakeQuantizeBase)


def _plain_call(graph: fx.Graph, node: Node) -> None:
    kwargs = {name: value for name, value in node.kwargs.items() if name != 'bias_input'}
    with graph.inserting_before(node):
        new = graph.call_module(node.args[0].target, tuple(node.args[MODULES_READ[node.target] :]), kwargs)
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    graph.erase_node(node)


def _explicit(graph: fx.Graph, node: Node, root: nn.Module, baked: dict[str, str], explicit: bool) -> None:
    source = node.args[0]
    if source.op == 'get_attr' and baked.get(source.target) == node.target:
        node.replace_all_uses_with(source)
        graph.erase_node(node)
        return
    if not explicit:
        return
    quantizer = root.get_submodule(node.target)
    if isinstance(quantizer, DoReFaFakeQuantize):  # of weights that are computed: it is no quantization alone
        return
    # torch's own fake quantizers do not write themselves down, but are of the simplest kind.
    write = getattr(quantizer, 'explicit', functools.partial(FakeQuantize.explicit, quantizer))
    with graph.inserting_before(node):
        real = write(
            source,
            lambda function, *arguments: graph.call_function(function, arguments),
            lambda name: graph.get_attr(f'{node.target}.{name}'),
        )
    real.meta = dict(node.meta)
    node.replace_all_uses_with(real)
    graph.erase_node(node)


def _explicit_bias(graph: fx.Graph, node: Node) -> None:
    bias, *quantizers = node.args
    with graph.inserting_before(node):
        scales = [graph.get_attr(f'{quantizer.target}.scale') for quantizer in quantizers]
        new = graph.call_function(rounded_bias, (bias, *scales))
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    graph.erase_node(node)


@torch.no_grad()
def convert_weights(graphs: list[fx.Graph], root: nn.Module, baked: dict[str, str]) -> None:
    """Bakes folded and quantized weights into the layers of an island, and removes norms and weight quantizers.

    Args:
        graphs: the graphs with fake quantizers, before :func:`convert_graph`.
        root: the island's module; changed in place.
        baked: what :func:`baked_parameters` returned.
    """
    calls = _layer_calls(graphs)
    for layer_path, found in calls.items():
        _bake_layer(root, layer_path, found)
    for weight_path, quantizer_path in baked.items():
        owner_path, _, name = weight_path.rpartition('.')
        if owner_path not in calls:
            owner = root.get_submodule(owner_path)
            _set_parameter(owner, name, root.get_submodule(quantizer_path)(getattr(owner, name)))
    kept = _quantizers_read(graphs, baked)
    for layer_path in calls:
        if f'{layer_path}.{WEIGHT_QUANTIZER}'.lstrip('.') not in kept:
            root.get_submodule(layer_path)._modules.pop(WEIGHT_QUANTIZER, None)


def _quantizers_read(graphs: list[fx.Graph], baked: dict[str, str]) -> set[str]:
    """Returns the paths that functions read: quantizers of weights that are not baked, and for the scales of biases."""
    found = set()
    for graph in graphs:
        for node in graph.nodes:
            source = node.args[0] if node.op == 'call_module' and node.args else None
            is_baked = isinstance(source, Node) and baked.get(source.target) == node.target
            if node.op in ('get_attr', 'call_module') and not is_baked:
                found.add(node.target)
    return found


def _bake_layer(root: nn.Module, layer_path: str, calls: _LayerCalls) -> None:
    layer = root.get_submodule(layer_path)
    if not hasattr(layer, WEIGHT_QUANTIZER):  # baked before: it is part of another island too
        return
    weight, bias = layer.weight, layer.bias
    if calls.norm is not None:
        norm = root.get_submodule(calls.norm)
        weight, bias = folded_weight(layer, norm), folded_bias(layer, norm)
        _replace(root, calls.norm, nn.Identity())
    # Before the bias, whose scale may be that of the weight quantized last.
    weight = layer.weight_fake_quant(weight)
    bias = _baked_bias(root, layer_path, bias, calls)
    if bias is not layer.bias:
        layer.bias = nn.Parameter(bias)
    _set_parameter(layer, 'weight', weight)


def _baked_bias(root: nn.Module, layer_path: str, bias: Tensor | None, calls: _LayerCalls) -> Tensor | None:
    if bias is None or calls.bias_inputs == {None}:
        return bias
    if len(calls.bias_inputs) > 1 or calls.bias_is_read:
        reason = 'a bias that functions read too' if calls.bias_is_read else 'inputs of different scales'
        warnings.warn(f'{layer_path} has {reason}; its bias stays float', stacklevel=2)
        return bias
    quantizer = root.get_submodule(next(iter(calls.bias_inputs)))
    return quantized_bias(bias, quantizer, root.get_submodule(layer_path).weight_fake_quant)


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


def _layer_calls(graphs: list[fx.Graph]) -> dict[str, _LayerCalls]:
    calls: dict[str, _LayerCalls] = {}
    read: set[str] = set()
    for graph in graphs:
        for node in graph.nodes:
            if node.op == 'get_attr':
                read.add(node.target)
            if node.op != 'call_function' or node.target not in MODULES_READ:
                continue
            norm = node.args[1].target if MODULES_READ[node.target] == 2 else None
            source = node.kwargs.get('bias_input')
            found = calls.setdefault(node.args[0].target, _LayerCalls(norm, set()))
            found.bias_inputs.add(None if source is None else source.target)
    for layer_path, found in calls.items():
        found.bias_is_read = f'{layer_path}.bias'.lstrip('.') in read
    return calls


def _replace(root: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition('.')
    root.get_submodule(parent)._modules[name] = module


__all__ = ['baked_parameters', 'convert_graph', 'convert_weights']
