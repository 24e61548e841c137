"""Grids for the tensors in front of operations that move values and compute none."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator

import onnx

from mmrazor_quant.backends.intermediate import FAKE_QUANT, Intermediate
from mmrazor_quant.backends.qdq_graph import MOVING, QdqGraph

CONCAT = 'Concat'
FILLING = ('Pad', 'Expand')
"""Of those that move, the ones that may add values of their own, or have few values become many."""


def spread(network: Intermediate) -> Intermediate:
    """Puts, where the result of an operation that moves values is quantized, the same grid in front of it, too.

    Both sides of every such operation are quantized then, and no value changes.

    Args:
        network: the intermediate form; left as it is.

    Returns:
        A copy with more fake quantizers.
    """
    model = copy.deepcopy(network.onnx)
    graph = QdqGraph(model)
    nodes = list(model.graph.node)
    for quantizer in graph.nodes(FAKE_QUANT):
        _in_front(graph, nodes, quantizer, quantizer.input[0])
    nodes = [copy.deepcopy(node) for node in nodes]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return dataclasses.replace(network, onnx=model)


def _in_front(graph: QdqGraph, nodes: list[onnx.NodeProto], quantizer: onnx.NodeProto, tensor: str) -> None:
    mover = graph.made_by(tensor, CONCAT, *MOVING)
    if mover is None or mover.op_type in FILLING or len(graph.readers[tensor]) > 1:
        return
    for i, source in list(_sources(graph, mover)):
        _in_front(graph, nodes, quantizer, source)
        new = copy.deepcopy(quantizer)
        new.input[0], new.output[0], new.name = source, f'{tensor}.from_{i}', ''
        mover.input[i] = new.output[0]
        nodes.insert(next(at for at, node in enumerate(nodes) if node is mover), new)


def _sources(graph: QdqGraph, mover: onnx.NodeProto) -> Iterator[tuple[int, str]]:
    """Yields the inputs that no grid is known for."""
    for i, source in enumerate(mover.input if mover.op_type == CONCAT else mover.input[:1]):
        readers = {node.op_type for node in graph.readers[source]}
        if source not in graph.constants and FAKE_QUANT not in readers and not graph.made_by(source, FAKE_QUANT):
            yield i, source
