"""Which layers of a network a backend's table says run in integers, to be held against what it runs."""

from __future__ import annotations

from collections import defaultdict

import onnx

from .intermediate import DOMAIN, Intermediate
from .rules import Rules


def integer_layers(network: Intermediate, rules: Rules) -> list[str]:
    """Names the layers that a backend should run in integers.

    Args:
        network: a network whose quantizers are placed for the backend.
        rules: the backend's table.

    Returns:
        Names of the nodes with integer weights and quantized inputs; without those whose results are the network's
        own, where the backend needs quantized results.
    """
    graph = network.onnx.graph
    producers = {output: node for node in graph.node for output in node.output}
    readers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
    for node in graph.node:
        for name in node.input:
            readers[name].append(node)
    outputs = {output.name for output in graph.output}
    # By name: equal weights of several layers are one initializer with identities behind it.
    layers = {node.name: node for name in network.weights for node in _layers_of(name, readers)}
    return [
        name
        for name, node in layers.items()
        if _is_quantized(node.input[0], producers)
        and not (rules.quantize_results and _is_result(node, readers, outputs))
    ]


def _layers_of(weight: str, readers: dict[str, list[onnx.NodeProto]]) -> list[onnx.NodeProto]:
    """Returns the nodes that compute with a weight, which may be transposed or reshaped before."""
    found = []
    for node in readers[weight]:
        if node.op_type in ('Transpose', 'Reshape', 'Identity', 'Unsqueeze', 'Squeeze'):
            found += _layers_of(node.output[0], readers)
        else:
            found.append(node)
    return found


def _is_quantized(tensor: str, producers: dict[str, onnx.NodeProto]) -> bool:
    """Tells whether a tensor comes from a quantizer, through operations that move values only."""
    while tensor in producers:
        node = producers[tensor]
        if node.domain == DOMAIN:
            return True
        if node.op_type not in _MOVES:
            return False
        tensor = node.input[0]
    return False


_MOVES = ('Identity', 'Reshape', 'Transpose', 'Flatten', 'Squeeze', 'Unsqueeze', 'MaxPool', 'Concat', 'Slice', 'Gather')


def _is_result(node: onnx.NodeProto, readers: dict[str, list[onnx.NodeProto]], outputs: set[str]) -> bool:
    """Tells whether what a node computes gets out of the network without being quantized on the way."""
    tensors, seen = list(node.output), set()
    while tensors:
        tensor = tensors.pop()
        if tensor in outputs:
            return True
        for reader in readers[tensor]:
            is_layer = reader.op_type in ('Conv', 'ConvTranspose', 'Gemm', 'MatMul')
            is_quantizer = reader.domain == DOMAIN
            if not (is_layer or is_quantizer or reader.name in seen):
                seen.add(reader.name)
                tensors += reader.output
    return False
