"""One island as a row of units over groups of samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from mmengine.logging import MMLogger
from torch import Tensor, fx, nn
from torch.fx import Node

from mmrazor_quant.graph.units import Unit, find_units
from mmrazor_quant.tracing.code import compile_graph
from mmrazor_quant.tracing.island import Capture, Island

from .cache import ActivationCache
from .samples import Call, Group, Values, chunks, group_calls, is_divisible, separate_calls

CHUNK = 64
"""Samples in a piece of a pass over all of them."""

NO_GRAPH = 'no graph serves its calls on the calibration data'
"""Why an island is left as it is whose calls cannot be captured, or are captured anew each time."""

TRIED = 3
"""Samples on which it is seen whether they can be taken apart."""

Bound = Callable[..., 'tuple[Any, ...]']


class UnitOfGroups:
    """A unit, in the graph of each group.

    Args:
        module: The island's module.
        by_kind: The unit in each graph.
    """

    def __init__(self, module: nn.Module, by_kind: dict[int, Unit]) -> None:
        self.by_kind = by_kind
        self.functions: dict[int, Bound] = {}
        for kind, unit in by_kind.items():
            self.functions[kind] = _bind(compile_graph(unit.function_graph), module)

    @property
    def first(self) -> Unit:
        """The unit in one of the graphs; names, weights and quantizers are those of all."""
        return next(iter(self.by_kind.values()))


def _bind(function: Callable[..., Any], module: nn.Module) -> Bound:
    return lambda *inputs: function(module, *inputs)


class UnitizedIsland:
    """The units of an island, its samples, and the values that pass between units.

    Args:
        module: Module with an island.
        granularity: See :func:`find_units`.
    """

    def __init__(self, module: nn.Module, granularity: str) -> None:
        self.module, self.island = module, Island.of(module)
        self.granularity = granularity
        captures = [c for variant in self.island.variants for c in variant.captures.get(False, ())]
        self.captures: dict[int, Capture] = {id(capture): capture for capture in captures}
        self.units: list[UnitOfGroups] = []

    def plan(self, kinds: list[int] | None = None) -> list[UnitOfGroups]:
        """Find the units: those that all graphs have, or else the whole island.

        Graphs may differ in sizes, and in what else their units read, such as a mask that some calls come without.

        Args:
            kinds: The graphs that are used; None: all of them.

        Returns:
            The units, in an order in which they can run.

        Raises:
            ValueError: No graph is used, or the graphs have different layers.
        """
        kinds = list(self.captures if kinds is None else filter(self.captures.__contains__, kinds))
        if not kinds:
            raise ValueError(NO_GRAPH)
        for granularity in (self.granularity, 'island'):
            found = {kind: find_units(self.captures[kind].graph, self.module, granularity) for kind in kinds}
            signatures = {kind: [_signature(unit) for unit in units] for kind, units in found.items()}
            first = signatures[kinds[0]]
            if all(signature == first for signature in signatures.values()):
                self.units = [UnitOfGroups(self.module, {k: found[k][i] for k in kinds}) for i in range(len(first))]
                return self.units
        raise ValueError('its calls have different layers')

    def serves(self, kind: int) -> bool:
        """Tell whether the units are those of a graph too."""
        return bool(self.units) and kind in self.units[0].by_kind

    def start(self, calls: list[Call]) -> list[Group]:
        """Group calls, taking apart the samples where that changes nothing."""
        groups: list[Group] = []
        for group in group_calls(calls):
            whole = group.divisible and not self._is_divisible(group)
            groups += separate_calls(group) if whole else [group]
        return groups

    def _is_divisible(self, group: Group) -> bool:
        inputs = _first_samples(group, TRIED)
        if group.count < 2:
            return True
        values: dict[Node, Any] = dict(zip(self.placeholders(group.kind), inputs))
        for unit in self.units:
            own = unit.by_kind[group.kind]
            arguments = [values[node] for node in own.inputs]
            try:
                if not is_divisible(unit.functions[group.kind], arguments):
                    return False
            except RuntimeError:  # one sample alone has another shape than the graph is for
                return False
            with torch.no_grad():
                copies = [x.clone() if isinstance(x, Tensor) else x for x in arguments]
                values.update(zip(own.outputs, unit.functions[group.kind](*copies)))
        return True

    def placeholders(self, kind: int) -> list[Node]:
        """Give the inputs of a graph."""
        return [node for node in self.captures[kind].graph.nodes if node.op == 'placeholder']

    def output(self, kind: int) -> Any:
        """Give what a graph returns: a structure of nodes."""
        return next(node for node in self.captures[kind].graph.nodes if node.op == 'output').args[0]


def _signature(unit: Unit) -> tuple:
    return unit.name, unit.weights, unit.quantizers, len(unit.outputs)


def _first_samples(group: Group, count: int) -> list[Any]:
    """Give the inputs of a few samples of a group, from as many calls as need be."""
    inputs = []
    for parts in zip(*(call.inputs for call in group.calls[:count])):
        is_tensor = isinstance(parts[0], Tensor)
        inputs.append(torch.cat([part[:count] for part in parts])[:count] if is_tensor else parts[0])
    return inputs


class Flow:
    """The values of one state of the model, float or quantized, inside an island.

    Args:
        island: The island.
        groups: Its samples.
        cache: Where values are kept.
    """

    def __init__(self, island: UnitizedIsland, groups: list[Group], cache: ActivationCache) -> None:
        self.island, self.groups, self.cache = island, groups, cache
        self._values: dict[int, Values] = {}
        self._kinds = {group.kind for group in groups}
        # One number may be another input in each graph: a value is read for the samples of one graph at a time.
        self._numbers = {node: i for kind in self._kinds for i, node in enumerate(island.placeholders(kind))}
        self._next = 1 + max(self._numbers.values(), default=0)

    def take_inputs(self, calls: dict[tuple[int, int], Call]) -> None:
        """Keep the inputs of all calls, which are given up.

        Args:
            calls: The calls by key.
        """
        for number, group in enumerate(self.groups):
            for index, call in enumerate(group.calls):
                found = calls[call.key]
                for position, value in enumerate(found.inputs):
                    self._values.setdefault(position, Values(self.groups, self.cache))
                    self._values[position].write(number, group.rows(index), value)
        for call in calls.values():
            for value in call.inputs:
                if isinstance(value, Tensor):
                    self.cache.free(value)
            call.inputs = []

    def inputs(self, unit: UnitOfGroups) -> list[list[Values]]:
        """Give the inputs of a unit for each group, of which its graph may have more or fewer than others."""
        return [[self._values[self._numbers[node]] for node in unit.by_kind[g.kind].inputs] for g in self.groups]

    @torch.no_grad()
    def run(self, unit: UnitOfGroups) -> list[Values]:
        """Run a unit on all samples, in its present state, and give its outputs."""
        inputs = self.inputs(unit)
        outputs = [Values(self.groups, self.cache) for _ in unit.first.outputs]
        for number, group in enumerate(self.groups):
            for rows in chunks(group, CHUNK):
                results = unit.functions[group.kind](*(values.read(number, rows) for values in inputs[number]))
                for values, result in zip(outputs, results):
                    values.write(number, rows, result)
        return outputs

    def keep(self, unit: UnitOfGroups, outputs: list[Values]) -> None:
        """Have later units, and the island, read these outputs of a unit."""
        for position, values in enumerate(outputs):
            for kind in self._kinds:
                self._numbers[unit.by_kind[kind].outputs[position]] = self._next
            self._values[self._next] = values
            self._next += 1

    def release(self, done: int) -> None:
        """Give up the values that no unit after the first ``done`` ones reads, nor the island's output."""
        wanted: set[Node] = set()
        for kind in self._kinds:
            wanted.update(node for unit in self.island.units[done:] for node in unit.by_kind[kind].inputs)
            fx.node.map_arg(self.island.output(kind), wanted.add)
        kept = {self._numbers[node] for node in wanted if node in self._numbers}
        for number in [n for n in self._values if n not in kept]:
            self._values.pop(number).free()

    def outputs(self) -> dict[tuple[int, int], Callable[[], Any]]:
        """Give, for each call, what makes the island's output."""
        made = {}
        for number, group in enumerate(self.groups):
            for index, call in enumerate(group.calls):
                made[call.key] = self._maker(number, group.rows(index) if group.divisible else slice(0, 1))
        return made

    def _maker(self, number: int, rows: slice) -> Callable[[], Any]:
        structure = self.island.output(self.groups[number].kind)

        def make() -> Any:
            return fx.node.map_arg(structure, lambda node: self._values[self._numbers[node]].read(number, rows))

        return make

    def close(self) -> None:
        """Give up all values."""
        for values in self._values.values():
            values.free()
        self._values.clear()


def log_whole(path: str, reason: str) -> None:
    """Say that an island is not reconstructed."""
    MMLogger.get_current_instance().warning(f'Reconstruction leaves {path or "the model"} as it is: {reason}')
