"""The network with Q/DQ pairs for ONNX Runtime's QNN provider, which has the HTP run what stands between them."""

from __future__ import annotations

import copy

import numpy as np
import onnx
from onnx import helper, numpy_helper, version_converter

from mmrazor_quant.backends.intermediate import Intermediate
from mmrazor_quant.backends.qdq import Writer, to_qdq
from mmrazor_quant.backends.qdq_graph import DQ, QdqGraph

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
    model = to_qdq(network, QNNWriter)
    _quantize_biases(model)
    small = [name for name, grid in network.weights.items() if grid.quant_max - grid.quant_min < 2**4]
    if small:
        model = _in_four_bits(model, {f'{name}.{part}' for name in small for part in ('integers', 'zero_point')})
    onnx.checker.check_model(model, full_check=True)
    return model


def _in_four_bits(model: onnx.ModelProto, names: set[str]) -> onnx.ModelProto:
    """Stores initializers as INT4, which ONNX has from opset 21 on."""
    model = version_converter.convert_version(model, 21)
    for tensor in model.graph.initializer:
        if tensor.name in names:
            values = numpy_helper.to_array(tensor)
            tensor.CopyFrom(helper.make_tensor(tensor.name, onnx.TensorProto.INT4, values.shape, values.flatten()))
    return model


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
        product = (scales[0] * scales[1]).reshape(-1)
        # A transposed convolution has the same scales in every group.
        nodes.append(_dequantized(model.graph, name, bias, np.tile(product, bias.size // product.size)))
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
