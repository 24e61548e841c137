"""TensorRT's rules for explicit quantization, each a function that finds what breaks it.

They follow NVIDIA's documentation of explicit quantization and the importer of Q/DQ nodes of onnx-tensorrt. That a file
has no findings does not mean that TensorRT builds it: what else it may refuse is known there only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import NodeProto, TensorProto

from mmrazor_quant.backends.qdq_graph import DQ, LAYERS, Q, QdqGraph, channel_axis

OPSET = 13
TYPES = (TensorProto.INT8, TensorProto.INT4, TensorProto.FLOAT8E4M3FN)
UNSUPPORTED = (
    'QLinearConv', 'QLinearMatMul', 'QLinearAdd', 'QGemm', 'ConvInteger', 'MatMulInteger', 'DynamicQuantizeLinear',
)  # fmt: skip

Found = Iterator['tuple[str, str]']
"""Names of nodes, with what is wrong."""


@dataclass(frozen=True)
class Finding:
    """A node that breaks a rule.

    Args:
        rule: name of the rule.
        node: name of the node, or of its result where it has none.
        what: what is wrong.
        is_error: whether TensorRT refuses such a file, or runs it in another way than is meant.
    """

    rule: str
    node: str
    what: str
    is_error: bool = True

    def __str__(self) -> str:
        return f'{self.node}: {self.what} ({self.rule})'


def lint(model: onnx.ModelProto) -> list[Finding]:
    """Returns all that breaks a rule in a file.

    Args:
        model: the file.
    """
    graph = QdqGraph(model)
    return [
        Finding(name, node, what, is_error=name not in ADVICE)
        for name, rule in RULES.items()
        for node, what in rule(graph)
    ]


def opset(graph: QdqGraph) -> Found:
    """Scales per channel came with opset 13."""
    for entry in graph.model.opset_import:
        if entry.domain == '' and entry.version < OPSET:
            yield graph.model.graph.name, f'opset {entry.version}, allowed: {OPSET} and later'


def operations(graph: QdqGraph) -> Found:
    """Quantization is said by pairs only."""
    for node in graph.nodes(*UNSUPPORTED):
        yield name_of(node), f'{node.op_type}, allowed: {Q} and {DQ} around float operations'


def constants(graph: QdqGraph) -> Found:
    """Scales and zero points are known when the engine is built."""
    for node in graph.nodes(Q, DQ):
        if any(name and name not in graph.constants for name in node.input[1:]):
            yield name_of(node), 'scale or zero point is computed, allowed: constants'


def zero_points(graph: QdqGraph) -> Found:
    """Quantization is symmetric."""
    for node in graph.nodes(Q, DQ):
        _, zero_point = graph.scale_and_zero_point(node)
        if zero_point is not None and np.any(zero_point != 0):
            yield name_of(node), f'zero point {zero_point.flat[np.argmax(zero_point != 0)]:g}, allowed: 0'


def positive_scales(graph: QdqGraph) -> Found:
    """Scales are positive and finite."""
    for node in graph.nodes(Q, DQ):
        scale, _ = graph.scale_and_zero_point(node)
        if scale is not None and not np.all((scale > 0) & np.isfinite(scale)):
            yield name_of(node), f'scale {scale.min():g}, allowed: positive numbers'


def counts(graph: QdqGraph) -> Found:
    """There are as many zero points as scales."""
    for node in graph.nodes(Q, DQ):
        scale, zero_point = graph.scale_and_zero_point(node)
        if scale is not None and zero_point is not None and scale.size != zero_point.size:
            yield name_of(node), f'{zero_point.size} zero points, allowed: as many as scales, {scale.size}'


def types(graph: QdqGraph) -> Found:
    """Integers are signed; an int32 bias is a finding of its own."""
    for node in graph.nodes(Q, DQ):
        found = graph.integer_type(node)
        if found not in (*TYPES, TensorProto.INT32):
            allowed = ', '.join(TensorProto.DataType.Name(kind) for kind in TYPES)
            yield name_of(node), f'type {TensorProto.DataType.Name(found)}, allowed: {allowed}'


def float_biases(graph: QdqGraph) -> Found:
    """Biases are float."""
    for node in graph.nodes(DQ):
        if graph.integer_type(node) == TensorProto.INT32:
            yield name_of(node), 'an int32 tensor is dequantized, allowed: float biases'


def nothing_between(graph: QdqGraph) -> Found:
    """Nothing works on integers between the operations of a pair: neither Clip nor Relu does."""
    for node in graph.nodes(Q):
        others = [reader.op_type for reader in graph.readers[node.output[0]] if reader.op_type != DQ]
        if others or node.output[0] in graph.outputs:
            yield name_of(node), f'{", ".join(others) or "the output"} reads its integers, allowed: {DQ}'


def activations_per_tensor(graph: QdqGraph) -> Found:
    """An activation has one scale."""
    for node in graph.nodes(Q, DQ):
        scale, _ = graph.scale_and_zero_point(node)
        if scale is not None and scale.size != 1 and graph.weight(node) is None:
            yield name_of(node), f'{scale.size} scales for an activation, allowed: 1'


def weights_per_channel(graph: QdqGraph) -> Found:
    """A list of scales of a weight is as long as the dimension of the output channels, and says which that is."""
    for node in graph.nodes(*LAYERS):
        pair = graph.made_by(node.input[1], DQ)
        weight = None if pair is None else graph.weight(pair)
        scale = None if weight is None else graph.scale_and_zero_point(pair)[0]
        if scale is None or scale.ndim != 1 or scale.size == 1:
            continue
        wanted = channel_axis(node, len(weight.dims))
        found = axis_of(pair) % len(weight.dims)
        if found != wanted or scale.size != weight.dims[wanted]:
            yield (
                name_of(pair),
                f'{scale.size} scales along dimension {found} of {list(weight.dims)}, allowed for {node.op_type}: '
                f'{weight.dims[wanted]} along {wanted}',
            )


def blocks(graph: QdqGraph) -> Found:
    """Scales with as many dimensions as the weight divide it into blocks along one of them."""
    for node in graph.nodes(Q, DQ):
        scale, _ = graph.scale_and_zero_point(node)
        weight = graph.weight(node)
        if scale is None or weight is None or scale.ndim < 2:
            continue
        differing = [d for d, (have, size) in enumerate(zip(scale.shape, weight.dims)) if have != size]
        if scale.ndim != len(weight.dims) or len(differing) > 1:
            yield name_of(node), f'scales {list(scale.shape)} of {list(weight.dims)}, allowed: blocks in one dimension'


def four_bits(graph: QdqGraph) -> Found:
    """INT4 is for weights, two of them in a byte."""
    for node in graph.nodes(Q, DQ):
        if graph.integer_type(node) != TensorProto.INT4:
            continue
        weight = graph.weight(node)
        if weight is None:
            yield name_of(node), 'INT4 for an activation, allowed: weights'
        elif not weight.dims or weight.dims[-1] % 2:
            yield name_of(node), f'INT4 for a weight of {list(weight.dims)}, allowed: an even last dimension'


def both_inputs(graph: QdqGraph) -> Found:
    """A layer runs in integers if all it multiplies is quantized; weights of four bits stand alone."""
    for node in graph.nodes(*LAYERS):
        quantized = [graph.is_dequantized(name) for name in node.input[:2]]
        if any(quantized) and not all(quantized) and not _has_four_bits(graph, node):
            side = 'input' if quantized[1] else 'weight'
            yield name_of(node), f'its {side} alone is not quantized, allowed: both or none'


def residual_side(graph: QdqGraph) -> Found:
    """A layer and the addition behind it are one: between them nothing is rounded."""
    for node in graph.nodes('Add'):
        if all(graph.made_by(name, DQ) is not None for name in node.input):
            for name in node.input:
                layer = _layer_of_branch(graph, name)
                if layer is not None:
                    yield name_of(node), f'the result of {name_of(layer)} is quantized, too, allowed: the other input'
                    break


def results(graph: QdqGraph) -> Found:
    """What no layer, product or addition reads is not quantized."""
    for node in graph.nodes(DQ):
        readers = [reader.op_type for reader in graph.uses(node.output[0])]
        if graph.weight(node) is None and not {*readers} & {*LAYERS, 'Add'}:
            yield name_of(node), f'quantized for {", ".join(readers) or "the output"}, allowed: layers and additions'


def name_of(node: NodeProto) -> str:
    """Returns the name of a node, or that of its result."""
    return node.name or node.output[0]


def axis_of(pair: NodeProto) -> int:
    """Returns the axis attribute of a node of a pair, which is 1 where it is not given."""
    return next((a.i for a in pair.attribute if a.name == 'axis'), 1)


def _has_four_bits(graph: QdqGraph, layer: NodeProto) -> bool:
    pair = graph.made_by(layer.input[1], DQ)
    return pair is not None and graph.integer_type(pair) == TensorProto.INT4


def _layer_of_branch(graph: QdqGraph, name: str) -> NodeProto | None:
    """Returns the layer that gives its result to the quantized input of an addition alone."""
    before = graph.made_by(graph.producers[name].input[0], Q)
    if before is None or len(graph.readers[name]) > 1 or len(graph.readers[before.input[0]]) > 1:
        return None
    layer = graph.made_by(before.input[0], *LAYERS)
    weight = None if layer is None else graph.made_by(layer.input[1], DQ)
    # Of two activations, a matrix product is no layer.
    return None if weight is None or graph.weight(weight) is None else layer


RULES: dict[str, Callable[[QdqGraph], Found]] = {
    'opset': opset,
    'operations': operations,
    'constants': constants,
    'zero points': zero_points,
    'positive scales': positive_scales,
    'counts': counts,
    'types': types,
    'float biases': float_biases,
    'nothing between': nothing_between,
    'activations per tensor': activations_per_tensor,
    'weights per channel': weights_per_channel,
    'blocks': blocks,
    'four bits': four_bits,
    'both inputs': both_inputs,
    'residual side': residual_side,
    'results': results,
}
"""The rules by name."""

ADVICE = ('residual side', 'results')
"""Those about speed: what breaks them is built and computes what it says."""
