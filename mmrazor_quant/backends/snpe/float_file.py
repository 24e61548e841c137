"""The float network, and the encodings of its tensors."""

from __future__ import annotations

import copy

import onnx

from mmrazor_quant.backends.grid import QuantGrid
from mmrazor_quant.backends.intermediate import DOMAIN, FAKE_QUANT, Intermediate
from mmrazor_quant.backends.qdq import grid_of, remove_unused, resolve_constants

from .encodings import Encoding


def to_float(network: Intermediate) -> tuple[onnx.ModelProto, list[Encoding]]:
    """Takes the fake quantizers out of a network, and notes what they do to which tensor.

    Weights are on their grids already: whoever quantizes them gets the integers of training.

    Args:
        network: the intermediate form; left as it is.

    Returns:
        The float network, and the encodings of its tensors by their names in it.

    Raises:
        ValueError: a tensor that is read on two different grids, which encodings cannot say.
    """
    model = copy.deepcopy(network.onnx)
    graph = model.graph
    resolve_constants(graph)
    grids = _take_out(graph)
    del model.opset_import[:]
    model.opset_import.extend(o for o in network.onnx.opset_import if o.domain != DOMAIN)
    remove_unused(graph)
    onnx.checker.check_model(model, full_check=True)
    encodings = [Encoding(name, grid, False) for name, grid in grids.items()]
    return model, encodings + [Encoding(name, grid, True) for name, grid in network.weights.items()]


def _take_out(graph: onnx.GraphProto) -> dict[str, QuantGrid]:
    """Removes fake quantizers; what read their results reads what they read. Returns the grids by tensor."""
    values = {i.name: i for i in graph.initializer}
    sources: dict[str, str] = {}
    grids: dict[str, QuantGrid] = {}
    kept = []
    for node in graph.node:
        for i, name in enumerate(node.input):
            node.input[i] = sources.get(name, name)
        if node.op_type != FAKE_QUANT:
            kept.append(node)
            continue
        sources[node.output[0]] = node.input[0]
        _note(grids, node.input[0], grid_of(node, values))
    nodes = [copy.deepcopy(node) for node in kept]
    del graph.node[:]
    graph.node.extend(nodes)
    for output in graph.output:
        source = sources.get(output.name)
        if source is not None:
            _rename(graph, source, output.name)
            grids[output.name] = grids.pop(source)
    return grids


def _note(grids: dict[str, QuantGrid], name: str, grid: QuantGrid) -> None:
    before = grids.setdefault(name, grid)
    if _numbers(before) != _numbers(grid):
        raise ValueError(
            f'{name}: quantized to [{before.quant_min}, {before.quant_max}] with scale {before.scale[0]:g} and to '
            f'[{grid.quant_min}, {grid.quant_max}] with scale {grid.scale[0]:g}, allowed in encodings: one grid a '
            'tensor; give its readers the same scheme'
        )


def _numbers(grid: QuantGrid) -> tuple:
    return grid.quant_min, grid.quant_max, grid.scale.tolist(), grid.zero_point.tolist()


def _rename(graph: onnx.GraphProto, old: str, new: str) -> None:
    for node in graph.node:
        for names in (node.input, node.output):
            for i, name in enumerate(names):
                if name == old:
                    names[i] = new
