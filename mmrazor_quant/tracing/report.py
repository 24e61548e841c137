"""What was captured, for a person."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

from .errors import DataDependentError
from .finder import LAYER_TYPES, Findings, has_layers, layer_paths
from .nodes import custom_operation, scope_of

_OPAQUE = 'inside a call that is not looked into: the module computes with tensors in ways that torch does not show'


@dataclass(frozen=True)
class CaptureReport:
    """Islands and layers outside.

    Args:
        islands: for every island, its path, class, number of layers inside and of graph nodes.
        outside: for every quantizable layer outside the islands, its path and the reason.
        layers_total: number of layers with weights to quantize that run in inference.
        layers_alone: paths of layers that are an island by themselves although their parent does not depend on data.
        custom_ops: inside the islands, the operations of other libraries, which stay float: name by path of the module.
        training_only: paths of the modules that run in training only, and stay float.
    """

    islands: list[dict[str, Any]]
    outside: dict[str, str]
    layers_total: int
    layers_alone: list[str]
    custom_ops: dict[str, str] = field(default_factory=dict)
    training_only: list[str] = field(default_factory=list)

    @staticmethod
    def of(model: nn.Module, findings: Findings) -> CaptureReport:
        """Makes the report of a model that was searched for islands."""
        layers = [p for p in layer_paths(model) if not any(_within(p, module) for module in findings.training_only)]
        opaque = {path for path in _opaque_calls(model, findings) if path not in findings.islands}
        homes = {path: _home(path, findings) for path in layers}
        islands = [
            {
                'island': path,
                'class': type(model.get_submodule(path)).__name__,
                'layers': sum(home == path for home in homes.values()),
                'nodes': max(len(graph.nodes) for graph in island.graphs()),
                'resized': island.resized,
            }
            for path, island in findings.islands.items()
        ]
        outside = {path: _reason(path, findings) for path in layers if homes[path] is None}
        outside |= {p: _OPAQUE for p in layers if any(_within(p, call) for call in opaque)}
        return CaptureReport(
            islands, outside, len(layers), _alone(model, findings), _custom_ops(findings), list(findings.training_only)
        )

    @property
    def layers_inside(self) -> int:
        """Number of layers inside islands."""
        return self.layers_total - len(self.outside)

    def rows(self) -> list[dict[str, Any]]:
        """Returns one dict per island, then one per layer outside with the reason."""
        return [*self.islands, *({'outside': path, 'reason': reason} for path, reason in self.outside.items())]

    def table(self) -> str:
        """Returns the report as text."""
        lines = [f'{"island":<32} {"class":<28} {"layers":>6} {"nodes":>6}']
        lines += [
            f'{i["island"] or "(model)":<32} {i["class"]:<28} {i["layers"]:>6} {i["nodes"]:>6}' for i in self.islands
        ]
        lines.append(f'{self.layers_inside} of {self.layers_total} layers are inside islands.')
        lines += [f'outside, stays float: {path} ({reason})' for path, reason in self.outside.items()]
        lines += [f'custom operation, stays float: {path} ({name})' for path, name in self.custom_ops.items()]
        lines += [f'runs in training only, stays float: {path}' for path in self.training_only]
        return '\n'.join(lines)


def _within(path: str, island: str) -> bool:
    return not island or path == island or path.startswith(f'{island}.')


def _home(path: str, findings: Findings) -> str | None:
    """Returns the innermost island that a layer is in."""
    return max((island for island in findings.islands if _within(path, island)), key=len, default=None)


def _graphs(findings: Findings) -> Iterator[tuple[str, fx.Graph]]:
    for path, island in findings.islands.items():
        yield from ((path, graph) for graph in island.graphs())


def _opaque_calls(model: nn.Module, findings: Findings) -> Iterator[str]:
    """Yields the paths of submodules with layers that graphs call instead of containing what they do."""
    for path, graph in _graphs(findings):
        for node in graph.nodes:
            if node.op == 'call_module':
                target = f'{path}.{node.target}'.lstrip('.')
                module = model.get_submodule(target)
                if not isinstance(module, LAYER_TYPES) and has_layers(module):
                    yield target


def _custom_ops(findings: Findings) -> dict[str, str]:
    found = {}
    for path, graph in _graphs(findings):
        for node in graph.nodes:
            name = custom_operation(node)
            if name is not None:
                found[f'{path}.{scope_of(node)}'.strip('.')] = name
    return found


def _reason(path: str, findings: Findings) -> str:
    ancestors = [path[:i] for i, c in enumerate(path + '.') if c == '.']
    for ancestor in reversed(ancestors):
        if ancestor in findings.failures:
            return f'{ancestor}: {findings.failures[ancestor]}'
    return 'not reached'


def _alone(model: nn.Module, findings: Findings) -> list[str]:
    """Returns the layers that are islands by themselves for no good reason.

    Good reasons: the module they are part of depends on data, they are called from outside of it, or they are called
    by the model itself, whose modes are never one graph.
    """
    called_from_outside = {
        f'{path}.{entry}'.lstrip('.') for path, island in findings.islands.items() for entry in island.entries
    }
    return [
        path
        for path in findings.islands
        if isinstance(model.get_submodule(path), LAYER_TYPES)
        and '.' in path
        and path not in called_from_outside
        and not isinstance(findings.failures.get(path.rpartition('.')[0]), DataDependentError)
    ]
