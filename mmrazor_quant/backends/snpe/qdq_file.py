"""The network with Q/DQ pairs for ONNX Runtime's QNN provider, which has the HTP run what stands between them."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import onnx
from onnx import helper, numpy_helper

from mmrazor_quant.backends.intermediate import FAKE_QUANT, Intermediate
from mmrazor_quant.backends.qdq import Writer, to_qdq
from mmrazor_quant.backends.qdq_graph import DQ, MOVING, QdqGraph

BIASED = ('Conv', 'ConvTranspose', 'Gemm')
"""Operations with a bias as third input."""


class QNNWriter(Writer):
    """Pairs of uint8 without a Clip between: grids have all 256 integers, and are shifted, never cut."""

    def activation(self, node: onnx.NodeProto, is_not_negative: bool) -> list[onnx.NodeProto]:
        """Makes the pair that a FakeQuant node is."""
        return super().activation(node, is_not_negative=False)


def to_qnn(network: Intermediate) -> onnx.ModelProto:
    """Writes a network as the QNN provider wants it: every tensor quantized, biases too.

    Args:
        network: the intermediate form; left as it is.

    Returns:
        The network, with standard operations only.
    """
    model = to_qdq(_spread(network), QNNWriter)
    _quantize_biases(model)
    onnx.checker.check_model(model, full_check=True)
    return model


def _spread(network: Intermediate) -> Intermediate:
    """Puts, where the result of an operation that moves values is quantized, the same grid in front of it, too.

    Both sides of every operation are quantized then, and no value changes.
    """
    model = copy.deepcopy(network.onnx)
    graph = QdqGraph(model)
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        nodes.append(node)
        if node.op_type == FAKE_QUANT:
            _spread_one(graph, nodes, node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return dataclasses.replace(network, onnx=model)


def _spread_one(graph: QdqGraph, nodes: list[onnx.NodeProto], quantizer: onnx.NodeProto) -> None:
    mover = graph.made_by(quantizer.input[0], *MOVING)
    while mover is not None and len(graph.readers[mover.output[0]]) == 1 and mover.op_type not in ('Pad', 'Expand'):
        source = mover.input[0]
        if graph.made_by(source, FAKE_QUANT) is not None:
            return
        before = copy.deepcopy(quantizer)
        before.input[0], before.output[0], before.name = source, f'{mover.output[0]}.before', ''
        mover.input[0] = before.output[0]
        place = next(i for i, node in enumerate(nodes) if node is mover)
        nodes.insert(place, before)
        mover = graph.made_by(source, *MOVING)


def _quantize_biases(model: onnx.ModelProto) -> None:
    """Stores biases as int32 with the product of the scales of input and weight, which is the grid they lie on."""
    graph = QdqGraph(model)
    nodes = []
    for node in graph.nodes(*BIASED):
        bias = graph.values(node.input[2]) if len(node.input) > 2 else None
        scales = [_scale(graph, name) for name in node.input[:2]]
        if bias is None or any(scale is None for scale in scales):
            continue
        # Two layers may share a bias, with inputs of other scales.
        name = f'{node.output[0]}.bias'
        nodes.append(_dequantized(model.graph, name, bias, np.broadcast_to(scales[0] * scales[1], bias.shape)))
        node.input[2] = name
    everything = [*nodes, *map(copy.deepcopy, model.graph.node)]
    del model.graph.node[:]
    model.graph.node.extend(everything)
    used = {name for node in model.graph.node for name in node.input}
    for tensor in list(model.graph.initializer):
        if tensor.name not in used:
            model.graph.initializer.remove(tensor)


def _scale(graph: QdqGraph, name: str) -> np.ndarray | None:
    pair = graph.made_by(name, DQ)
    return None if pair is None else graph.scale_and_zero_point(pair)[0]


def _dequantized(graph: onnx.GraphProto, name: str, bias: np.ndarray, scale: np.ndarray) -> onnx.NodeProto:
    integers = np.rint(bias.astype(np.float64) / scale).clip(-(2**31), 2**31 - 1).astype(np.int32)
    stored = {'integers': integers, 'scale': scale.astype(np.float32), 'zero_point': np.zeros(bias.shape, np.int32)}
    for end, values in stored.items():
        graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(values), f'{name}.{end}'))
    inputs = [f'{name}.{end}' for end in stored]
    return helper.make_node(DQ, inputs, [name], f'{name}.dequantize', axis=0)
