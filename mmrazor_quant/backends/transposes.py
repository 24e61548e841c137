"""Weights of linear layers that a file transposes each time: stored transposed instead."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import onnx
from onnx import numpy_helper

from .grid import QuantGrid
from .intermediate import Intermediate


def fold_transposes(network: Intermediate) -> Intermediate:
    """Stores weights as matrix products read them, so that their channels are a dimension of what is read.

    Args:
        network: the intermediate form; left as it is.

    Returns:
        A copy without the transpositions.
    """
    model, weights = copy.deepcopy(network.onnx), dict(network.weights)
    for name, grid in network.weights.items():
        readers = [node for node in model.graph.node if name in node.input]
        orders = {tuple(_order(node)) for node in readers}
        if len(orders) != 1 or not all(node.op_type == 'Transpose' for node in readers):
            continue
        (order,) = orders
        weights[name] = _transposed(model.graph, name, grid, order)
        for node in readers:
            _replace(model.graph, node.output[0], name)
            model.graph.node.remove(node)
    return dataclasses.replace(network, onnx=model, weights=weights)


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
