"""Grids for the tensors around operations that move values and compute none."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator

import onnx

from mmrazor_quant.backends.intermediate import FAKE_QUANT, Intermediate
from mmrazor_quant.backends.qdq import grid_of, resolve_constants
from mmrazor_quant.backends.qdq_graph import LAYERS, MOVING, QdqGraph

CONCAT, RELU = 'Concat', 'Relu'
FILLING = ('Pad', 'Expand')
"""Of those that move, the ones that may add values of their own, or have few values become many."""


def spread(network: Intermediate, pairs: bool = False) -> Intermediate:
    """Quantizes both sides of operations that move values where one side is, with its grid: no value changes.

    Args:
        network: the intermediate form; left as it is.
        pairs: whether there has to be a fake quantizer on either side, as Q/DQ pairs need; otherwise, tensors in front
            of such operations get one, and those behind have the grid without.

    Returns:
        A copy with more fake quantizers.
    """
    model = copy.deepcopy(network.onnx)
    resolve_constants(model.graph)
    for kind in (_Backward, _Forward) if pairs else (_Backward,):
        kind(model, pairs).run()
    return dataclasses.replace(network, onnx=model)


class _Pass:
    def __init__(self, model: onnx.ModelProto, pairs: bool) -> None:
        self.model, self.graph, self.pairs = model, QdqGraph(model), pairs
        self.nodes = list(model.graph.node)

    def run(self) -> None:
        for node in list(self.model.graph.node):
            self.visit(node)
        nodes = [copy.deepcopy(node) for node in self.nodes]
        del self.model.graph.node[:]
        self.model.graph.node.extend(nodes)

    def insert(self, quantizer: onnx.NodeProto, source: str, output: str, node: onnx.NodeProto, after: bool) -> None:
        new = copy.deepcopy(quantizer)
        new.input[0], new.output[0], new.name = source, output, ''
        place = next(i for i, each in enumerate(self.nodes) if each is node)
        self.nodes.insert(place + after, new)
        self.graph.producers[output] = new


class _Backward(_Pass):
    """From the result of an operation to its inputs."""

    def visit(self, node: onnx.NodeProto) -> None:
        if node.op_type == FAKE_QUANT:
            self._in_front(node, node.input[0])

    def _in_front(self, quantizer: onnx.NodeProto, tensor: str) -> None:
        mover = self.graph.made_by(tensor, CONCAT, RELU, *MOVING)
        if mover is None or mover.op_type in FILLING or len(self.graph.readers[tensor]) > 1:
            return
        if mover.op_type == RELU and self._is_taken_in(mover, quantizer):
            return
        for i, source in list(self._sources(mover)):
            self._in_front(quantizer, source)
            mover.input[i] = f'{tensor}.from_{i}'
            self.insert(quantizer, source, mover.input[i], mover, after=False)

    def _is_taken_in(self, relu: onnx.NodeProto, quantizer: onnx.NodeProto) -> bool:
        """Tells whether a ReLU is one with the layer before it; of a pair, the lowest integer has to stand for zero."""
        grid = grid_of(quantizer, self.graph.constants)
        is_behind_layer = self.graph.made_by(relu.input[0], 'Add', *LAYERS) is not None
        return is_behind_layer and (not self.pairs or grid.quant_min == int(grid.zero_point[0]))

    def _sources(self, mover: onnx.NodeProto) -> Iterator[tuple[int, str]]:
        """Yields the inputs that no grid is known for."""
        for i, source in enumerate(mover.input if mover.op_type == CONCAT else mover.input[:1]):
            readers = {node.op_type for node in self.graph.readers[source]}
            is_known = FAKE_QUANT in readers or self.graph.made_by(source, FAKE_QUANT) is not None
            if source not in self.graph.constants and not is_known:
                yield i, source


class _Forward(_Pass):
    """From the input of an operation to what reads its results as they are."""

    def visit(self, node: onnx.NodeProto) -> None:
        quantizer = self.graph.made_by(node.input[0], FAKE_QUANT) if node.op_type in MOVING else None
        if quantizer is None or node.op_type in FILLING:
            return
        for i, tensor in enumerate(list(node.output)):
            readers = [reader for reader in self.graph.readers[tensor] if reader.op_type != FAKE_QUANT]
            if readers or tensor in self.graph.outputs:
                self._behind(quantizer, node, i, readers)

    def _behind(self, quantizer: onnx.NodeProto, node: onnx.NodeProto, i: int, readers: list[onnx.NodeProto]) -> None:
        tensor, moved = node.output[i], f'{node.output[i]}.moved'
        for reader in self.graph.readers[tensor]:
            if reader not in readers:
                reader.input[0] = moved
        node.output[i] = moved
        self.insert(quantizer, moved, tensor, node, after=True)
