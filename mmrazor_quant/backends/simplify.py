"""Removing what an exported network has and no backend needs: weights transposed each time, casts to the same type."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from .grid import QuantGrid
from .intermediate import FAKE_QUANT, Intermediate


def simplify(network: Intermediate) -> Intermediate:
    """Stores weights as matrix products read them, and takes out casts between float and float.

    Args:
        network: the intermediate form; left as it is.

    Returns:
        A copy of it.
    """
    model = copy.deepcopy(network.onnx)
    _drop_casts(model.graph)
    return dataclasses.replace(network, onnx=model, weights=_fold_transposes(model.graph, network.weights))


def _drop_casts(graph: onnx.GraphProto) -> None:
    """The exporter writes such casts for a tensor that is quantized twice, which shows that it is float."""
    floats = {node.input[0] for node in graph.node if node.op_type == FAKE_QUANT}
    for node in list(graph.node):
        if node.op_type == 'Cast' and node.attribute[0].i == TensorProto.FLOAT and node.input[0] in floats:
            _replace(graph, node.output[0], node.input[0])
            graph.node.remove(node)


def _fold_transposes(graph: onnx.GraphProto, grids: dict[str, QuantGrid]) -> dict[str, QuantGrid]:
    weights = dict(grids)
    for name, grid in grids.items():
        readers = [node for node in graph.node if name in node.input]
        orders = {tuple(_order(node)) for node in readers}
        if len(orders) != 1 or not all(node.op_type == 'Transpose' for node in readers):
            continue
        (order,) = orders
        weights[name] = _transposed(graph, name, grid, order)
        for node in readers:
            _replace(graph, node.output[0], name)
            graph.node.remove(node)
    return weights


def _order(node: onnx.NodeProto) -> list[int]:
    return next((list(a.ints) for a in node.attribute if a.name == 'perm'), [])


def _transposed(graph: onnx.GraphProto, name: str, grid: QuantGrid, order: tuple[int, ...]) -> QuantGrid:
    tensor = next(i for i in graph.initializer if i.name == name)
    values = np.ascontiguousarray(numpy_helper.to_array(tensor).transpose(order or None))
    tensor.CopyFrom(numpy_helper.from_array(values, name))
    order = order or tuple(reversed(range(values.ndim)))
    return grid if grid.ch_axis == -1 else dataclasses.replace(grid, ch_axis=order.index(grid.ch_axis))


def _replace(graph: onnx.GraphProto, old: str, new: str) -> None:
    for node in graph.node:
        for i, name in enumerate(node.input):
            if name == old:
                node.input[i] = new
