"""Taps: a look at, and a hand in, the output of every layer with a quantized weight while a model runs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, fx, nn

from mmrazor_quant.tracing.island import Island, islands_of

from .calls import quantized_calls

Tap = Callable[[nn.Module, Tensor], Tensor]
"""``tap(layer, output)``: given the output of a layer, with its folded batch norm; returns what goes on instead."""


@contextmanager
def tapped(model: nn.Module, tap: Tap) -> Iterator[None]:
    """Has each call of a layer with a quantized weight pass its output through a tap, for as long as the context lasts.

    Graphs captured meanwhile, for calls of a new kind or size, are tapped too. Afterwards all graphs are the ones
    without taps.

    Args:
        model: prepared model.
        tap: the tap.
    """
    islands = [(Island.of(module), module) for module in islands_of(model).values()]
    recaptures = [island.recapture for island, _ in islands]
    plain: dict[fx.Graph, fx.Graph] = {}

    def with_taps(graph: fx.Graph, module: nn.Module) -> fx.Graph:
        result = _with_taps(graph, module, tap)
        plain[result] = graph
        return result

    try:
        for island, module in islands:
            island.map_graphs(lambda graph, module=module: with_taps(graph, module))
            island.recapture = _tapped_recapture(island.recapture, with_taps)
        yield
    finally:
        for (island, _), recapture in zip(islands, recaptures):
            island.map_graphs(lambda graph: plain.get(graph, graph))
            island.recapture = recapture


def _tapped_recapture(recapture: Callable | None, with_taps: Callable[[fx.Graph, nn.Module], fx.Graph]) -> Any:
    if recapture is None:
        return None
    return lambda module, *call: with_taps(recapture(module, *call), module)


def _with_taps(graph: fx.Graph, root: nn.Module, tap: Tap) -> fx.Graph:
    def tap_layer(layer: nn.Module, output: Tensor) -> Tensor:
        # Guards of a graph are tried on the meta device, where there are no values.
        return output if output.is_meta else tap(layer, output)

    graph = copy.deepcopy(graph)
    for call in quantized_calls(graph, root):
        with graph.inserting_after(call.node):
            node = graph.call_function(tap_layer, (call.node.args[0], call.node))
        node.meta = dict(call.node.meta)
        call.node.replace_all_uses_with(node, delete_user_cb=lambda user, node=node: user is not node)
    graph.lint()
    return graph
