"""Taps: a look at what layers with quantized weights read, and a hand in what they give, while a model runs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, fx, nn

from mmrazor_quant.tracing.island import Island, islands_of

from .calls import quantized_calls

OutputTap = Callable[[nn.Module, Tensor], Tensor]
"""``tap(layer, output)``: given the output of a layer, with its folded batch norm; returns what goes on instead."""

InputTap = Callable[..., None]
"""``tap(layer, x, *args, **kwargs)``: given what a layer is called with, ``x`` with its quantizer behind it."""


@contextmanager
def tapped(model: nn.Module, output_tap: OutputTap | None = None, input_tap: InputTap | None = None) -> Iterator[None]:
    """Has taps called at each call of a layer with a quantized weight, for as long as the context lasts.

    Graphs captured meanwhile, for calls of a new kind or size, are tapped too. Afterwards all graphs are the ones
    without taps.

    Args:
        model: prepared model.
        output_tap: called with the outputs.
        input_tap: called with the inputs.
    """
    taps = (output_tap, input_tap)
    islands = [(Island.of(module), module) for module in islands_of(model).values()]
    saved = [(island.recapture, island.lower) for island, _ in islands]
    plain: dict[fx.Graph, fx.Graph] = {}

    def with_taps(graph: fx.Graph, module: nn.Module) -> fx.Graph:
        result = _with_taps(graph, module, *taps)
        plain[result] = graph
        return result

    try:
        for island, module in islands:
            island.map_graphs(lambda graph, module=module: with_taps(graph, module))
            island.recapture = _tapped_recapture(island.recapture, with_taps)
        yield
    finally:
        for (island, _), (recapture, lower) in zip(islands, saved):
            island.map_graphs(lambda graph: plain.get(graph, graph), lower)
            island.recapture = recapture


def _tapped_recapture(recapture: Callable | None, with_taps: Callable[[fx.Graph, nn.Module], fx.Graph]) -> Any:
    if recapture is None:
        return None
    return lambda module, *call: with_taps(recapture(module, *call), module)


def _with_taps(graph: fx.Graph, root: nn.Module, output_tap: OutputTap | None, input_tap: InputTap | None) -> fx.Graph:
    graph = copy.deepcopy(graph)
    for call in quantized_calls(graph, root):
        layer = call.node.args[0]
        if input_tap is not None:
            with graph.inserting_before(call.node):
                graph.call_function(_guarded_input(input_tap), (layer, *call.arguments), call.options)
        if output_tap is not None:
            with graph.inserting_after(call.node):
                node = graph.call_function(_guarded_output(output_tap), (layer, call.node))
            node.meta = dict(call.node.meta)
            call.node.replace_all_uses_with(node, delete_user_cb=lambda user, node=node: user is not node)
    graph.lint()
    return graph


def _guarded_output(tap: OutputTap) -> OutputTap:
    """Guards of a graph are tried on the meta device, where there are no values."""

    def tap_output(layer: nn.Module, output: Tensor) -> Tensor:
        return output if output.is_meta else tap(layer, output)

    return tap_output


def _guarded_input(tap: InputTap) -> InputTap:
    def tap_input(layer: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> None:
        if not x.is_meta:
            tap(layer, x, *args, **kwargs)

    return tap_input
