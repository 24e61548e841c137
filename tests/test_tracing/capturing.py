"""Capturing one forward, for the tests of the tracer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx, nn

from mmrazor_quant.tracing import CustomTracer
from mmrazor_quant.tracing.code import compile_graph
from mmrazor_quant.tracing.finder import equal


class Net(nn.Module):
    """A module whose forward is a function of itself and its arguments."""

    def __init__(self, forward: Callable[..., Any], **children: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.function = forward
        for name, value in children.items():
            setattr(self, name, value)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self, *args, **kwargs)


class Captured:
    """What the tracer made of a module's forward on an example.

    Args:
        module: The module, in the mode to capture.
        args: Example positional arguments.
        kwargs: Example keyword arguments.
        skipped_methods: As of :class:`CustomTracer`.
        opaque: As of :meth:`CustomTracer.capture`.
    """

    def __init__(
        self,
        module: nn.Module,
        args: tuple,
        kwargs: dict[str, Any],
        skipped_methods: Iterable[str] = (),
        opaque: Iterable[str] = (),
    ) -> None:
        self.module = module
        tracer = CustomTracer(skipped_methods)
        self.graph = tracer.capture(module, args, kwargs, opaque=frozenset(opaque))
        self._function = compile_graph(self.graph)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        inputs = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        return self._function(self.module, *inputs)

    def targets(self, op: str) -> list[Any]:
        """Targets of all nodes of one kind, in order."""
        return [node.target for node in self.graph.nodes if node.op == op]

    def names(self) -> list[str]:
        """Names of the functions and methods called, in order."""
        return [
            node.target if isinstance(node.target, str) else getattr(node.target, '__name__', '')
            for node in self.graph.nodes
            if node.op in ('call_function', 'call_method')
        ]


def capture(module: nn.Module, *args: Any, **kwargs: Any) -> Captured:
    """Captures ``module(*args, **kwargs)`` in the module's present mode."""
    return Captured(module, args, kwargs)


def assert_follows(forward: Callable[..., Any], *inputs: Any) -> Captured:
    """Captures a forward on the first input and compares it bit for bit on all of them.

    Args:
        forward: Function of the module and one input.
        *inputs: Inputs; tensors, or nested containers of tensors.

    Returns:
        The capture.
    """
    module = Net(forward).eval()
    captured = capture(module, inputs[0])
    for value in inputs:
        assert equal(module(value), captured(value)), captured.graph
    return captured


def nodes(graph: fx.Graph, op: str) -> list[fx.Node]:
    """Nodes of one kind, in order."""
    return [node for node in graph.nodes if node.op == op]
