"""From the intermediate form to standard ONNX: integer weights, and QuantizeLinear/DequantizeLinear pairs."""

from __future__ import annotations

import copy
from collections import defaultdict

import numpy as np
import onnx
from onnx import helper, numpy_helper

from .grid import QuantGrid
from .intermediate import DOMAIN, FAKE_QUANT, Intermediate

UINT8 = (0, 255)

NOT_NEGATIVE = ('Relu', 'Sigmoid', 'Softmax')
"""Operations without negative results."""

KEEP_SIGNS = ('MaxPool', 'GlobalAveragePool', 'AveragePool', 'Flatten', 'Reshape', 'Identity')
"""Operations whose results are not negative where their inputs are not."""


def to_qdq(network: Intermediate, writer: type[Writer] | None = None) -> onnx.ModelProto:
    """Writes a network with standard operations only.

    Args:
        network: the intermediate form; left as it is.
        writer: writes weights and activations; None: a :class:`Writer`.

    Returns:
        The network; a file of its own.
    """
    model = copy.deepcopy(network.onnx)
    graph = model.graph
    resolve_constants(graph)
    writer = (writer or Writer)(graph)
    for name, grid in network.weights.items():
        writer.weight(name, grid)
    producers = {output: node for node in graph.node for output in node.output}
    nodes = []
    for node in graph.node:
        if node.domain == DOMAIN and node.op_type == FAKE_QUANT:
            nodes += writer.activation(node, _is_not_negative(node.input[0], producers))
        else:
            nodes.append(node)
    del graph.node[:]
    graph.node.extend(writer.weight_nodes + nodes)
    del model.opset_import[:]
    model.opset_import.extend(o for o in network.onnx.opset_import if o.domain != DOMAIN)
    remove_unused(graph)
    onnx.checker.check_model(model, full_check=True)
    return model


class Writer:
    """Q/DQ pairs as integer kernels on x86 want them.

    Weights are stored as int8 behind a DequantizeLinear, quantized with the arithmetic of training. Activations are
    quantized to uint8: signed grids are shifted to it, or, behind a ReLU, cut to their upper half. A grid of fewer
    integers than uint8 has gets a Clip between the pair.

    Args:
        graph: what is written to.
    """

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.graph = graph
        self.values = {i.name: i for i in graph.initializer}
        self.weight_nodes: list[onnx.NodeProto] = []

    def weight(self, name: str, grid: QuantGrid) -> None:
        """Replaces a float initializer by integers and a DequantizeLinear, under the names of before."""
        integers = grid.integers(self.take(name)).astype(np.int8)
        inputs = [
            self.store(f'{name}.integers', integers),
            self.parameter(f'{name}.scale', grid.scale, grid.ch_axis),
            self.parameter(f'{name}.zero_point', grid.zero_point.astype(np.int8), grid.ch_axis),
        ]
        axis = {} if grid.ch_axis == -1 else dict(axis=grid.ch_axis)
        self.weight_nodes.append(helper.make_node('DequantizeLinear', inputs, [name], f'{name}.dequantize', **axis))

    def activation(self, node: onnx.NodeProto, is_not_negative: bool) -> list[onnx.NodeProto]:
        """Makes the pair, and maybe the Clip between, that a FakeQuant node is."""
        source, output = node.input[0], node.output[0]
        grid = grid_of(node, self.values)
        low, high, zero_point = as_uint8(grid, is_not_negative)
        scale = self.parameter(f'{output}.scale', grid.scale, -1)
        zero = self.parameter(f'{output}.zero_point', np.array([zero_point], dtype=np.uint8), -1)
        quantized = f'{output}.quantized'
        nodes = [helper.make_node('QuantizeLinear', [source, scale, zero], [quantized], f'{output}.quantize')]
        if (low, high) != UINT8:
            ends = [
                self.store(f'{output}.{end}', np.array(value, dtype=np.uint8))
                for end, value in (('lowest', low), ('highest', high))
            ]
            clipped = f'{output}.clipped'
            nodes.append(helper.make_node('Clip', [quantized, *ends], [clipped], f'{output}.clip'))
            quantized = clipped
        nodes.append(helper.make_node('DequantizeLinear', [quantized, scale, zero], [output], f'{output}.dequantize'))
        return nodes

    def take(self, name: str) -> np.ndarray:
        """Takes a weight out of the graph; returns its values.

        Args:
            name: name of the initializer.

        Raises:
            ValueError: there is none.
        """
        proto = self.values.get(name)
        if proto is None:
            raise ValueError(f'export: the file has no weight {name}')
        self.graph.initializer.remove(proto)
        return numpy_helper.to_array(proto)

    def parameter(self, name: str, values: np.ndarray, axis: int) -> str:
        """Stores scales or zero points under a name, which is returned."""
        # Per tensor they have to be scalars: of shape [1], ONNX Runtime does not fuse additions.
        return self.store(name, values.reshape(()) if axis == -1 else values)

    def store(self, name: str, values: np.ndarray) -> str:
        """Stores values under a name, which is returned."""
        kind = helper.np_dtype_to_tensor_dtype(values.dtype)
        tensor = helper.make_tensor(name, kind, values.shape, values.tobytes(), raw=True)
        self.graph.initializer.append(tensor)
        return name


def as_uint8(grid: QuantGrid, is_not_negative: bool) -> tuple[int, int, int]:
    """Returns lowest and highest integer and zero point of the same grid in unsigned integers.

    Args:
        grid: per tensor, of at most 256 integers.
        is_not_negative: whether the tensor has no negative values, so that integers below the zero point are unused.

    Raises:
        ValueError: a grid of more integers.
    """
    zero_point = int(grid.zero_point[0])
    if grid.quant_max - grid.quant_min > 255:
        raise ValueError(f'export: activations of more than 8 bits: [{grid.quant_min}, {grid.quant_max}]')
    # Kernels take in a ReLU only where the lowest integer is zero.
    shift = -zero_point if is_not_negative and zero_point >= grid.quant_min else -grid.quant_min
    low = max(grid.quant_min + shift, 0)
    return low, grid.quant_max + shift, zero_point + shift


def stored_grid(grid: QuantGrid, is_not_negative: bool) -> QuantGrid:
    """Returns a grid as it is in the file; see :func:`as_uint8`."""
    low, high, zero_point = as_uint8(grid, is_not_negative)
    return QuantGrid(grid.scale, np.array([zero_point]), low, high, -1)


def grid_of(node: onnx.NodeProto, values: dict[str, onnx.TensorProto]) -> QuantGrid:
    """Returns the grid of a FakeQuant node.

    Args:
        node: the node.
        values: initializers by name.
    """
    numbers = {a.name: a.i for a in node.attribute}
    scale, zero_point = (numpy_helper.to_array(values[name]) for name in node.input[1:3])
    return QuantGrid(scale, zero_point, numbers['quant_min'], numbers['quant_max'], numbers['axis'])


def _is_not_negative(tensor: str, producers: dict[str, onnx.NodeProto]) -> bool:
    """Tells whether a tensor comes from an operation without negative results, through others that keep signs."""
    while tensor in producers:
        node = producers[tensor]
        if node.op_type in NOT_NEGATIVE:
            return True
        if node.op_type not in KEEP_SIGNS:
            return False
        tensor = node.input[0]
    return False


def resolve_constants(graph: onnx.GraphProto) -> None:
    """Makes initializers of Constant nodes, and of identities of initializers, which fake quantizers may read."""
    known = {i.name: i for i in graph.initializer}
    for node in list(graph.node):
        value = None
        if node.op_type == 'Constant' and len(node.attribute) == 1 and node.attribute[0].name == 'value':
            value = copy.deepcopy(node.attribute[0].t)
        elif node.op_type == 'Identity' and node.input[0] in known:
            value = copy.deepcopy(known[node.input[0]])
        if value is not None:
            value.name = node.output[0]
            known[value.name] = value
            graph.initializer.append(value)
            graph.node.remove(node)


def remove_unused(graph: onnx.GraphProto) -> None:
    """Removes initializers, and nodes of weights, that nothing reads, and types of tensors that are no more."""
    readers: dict[str, int] = defaultdict(int)
    for node in graph.node:
        for name in node.input:
            readers[name] += 1
    for output in graph.output:
        readers[output.name] += 1
    for node in reversed(list(graph.node)):
        if not any(readers[name] for name in node.output):
            graph.node.remove(node)
            for name in node.input:
                readers[name] -= 1
    for tensor in list(graph.initializer):
        if not readers[tensor.name]:
            graph.initializer.remove(tensor)
    del graph.value_info[:]
