"""What was captured, for a person."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from .errors import DataDependentError
from .finder import LAYER_TYPES, Findings, layer_paths


@dataclass(frozen=True)
class CaptureReport:
    """Islands and layers outside.

    Args:
        islands: for every island, its path, class, number of layers inside and of graph nodes.
        outside: for every quantizable layer outside the islands, its path and the reason.
        layers_total: number of layers with weights to quantize.
        layers_alone: paths of layers that are an island by themselves although their parent does not depend on data.
    """

    islands: list[dict[str, Any]]
    outside: dict[str, str]
    layers_total: int
    layers_alone: list[str]

    @staticmethod
    def of(model: nn.Module, findings: Findings) -> CaptureReport:
        """Makes the report of a model that was searched for islands."""
        layers = layer_paths(model)
        inside = {path for path in layers if any(_within(path, island) for island in findings.islands)}
        islands = [
            {
                'island': path,
                'class': type(model.get_submodule(path)).__name__,
                'layers': sum(_within(layer, path) for layer in layers),
                'nodes': max(len(graph.nodes) for graph in island.graphs()),
                'resized': island.resized,
            }
            for path, island in findings.islands.items()
        ]
        outside = {path: _reason(path, findings) for path in layers if path not in inside}
        return CaptureReport(islands, outside, len(layers), _alone(model, findings))

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
        return '\n'.join(lines)


def _within(path: str, island: str) -> bool:
    return not island or path == island or path.startswith(f'{island}.')


def _reason(path: str, findings: Findings) -> str:
    ancestors = [path[:i] for i, c in enumerate(path + '.') if c == '.']
    for ancestor in reversed(ancestors):
        if ancestor in findings.failures:
            return f'{ancestor}: {findings.failures[ancestor]}'
    return 'not reached'


def _alone(model: nn.Module, findings: Findings) -> list[str]:
    return [
        path
        for path in findings.islands
        if isinstance(model.get_submodule(path), LAYER_TYPES)
        and not isinstance(findings.failures.get(path.rpartition('.')[0]), DataDependentError)
    ]
