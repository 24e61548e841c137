"""The calls of layers with quantized weights in a prepared graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx, nn
from torch.fx import Node

from .batch_fold import quantized_layer_batch_norm
from .layers import quantized_layer, quantized_layer_norm

MODULES_READ = {quantized_layer: 1, quantized_layer_norm: 2, quantized_layer_batch_norm: 2}
"""The calls of layers with quantized weights, and how many of their first arguments are modules."""


@dataclass(frozen=True)
class QuantizedCall:
    """One call of a layer with a quantized weight.

    Args:
        node: the call.
        layer: the layer.
        norm: the batch norm folded into it, or None.
        source: the node of its activations; None where they are given in an unusual way.
    """

    node: Node
    layer: nn.Module
    norm: nn.Module | None
    source: Node | None

    @property
    def arguments(self) -> tuple[Any, ...]:
        """What the layer is called with, beginning with its activations."""
        return tuple(self.node.args[MODULES_READ[self.node.target] :])

    @property
    def options(self) -> dict[str, Any]:
        """What the layer is called with by name."""
        return {name: value for name, value in self.node.kwargs.items() if name != 'bias_input'}


def quantized_calls(graph: fx.Graph, root: nn.Module) -> list[QuantizedCall]:
    """Returns the calls of layers with quantized weights in execution order.

    Args:
        graph: graph with fake quantizers.
        root: the island's module.
    """
    return [_call(node, root) for node in graph.nodes if node.op == 'call_function' and node.target in MODULES_READ]


def _call(node: Node, root: nn.Module) -> QuantizedCall:
    count = MODULES_READ[node.target]
    layer, *norm = [root.get_submodule(argument.target) for argument in node.args[:count]]
    source = node.args[count] if len(node.args) > count else None
    return QuantizedCall(node, layer, norm[0] if norm else None, source if isinstance(source, Node) else None)
