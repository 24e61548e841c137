"""How much the task's loss depends on each output of each unit (Li et al. 2021, "BRECQ", eq. 10)."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn

from mmrazor_quant.codebases import has_modes
from mmrazor_quant.tracing.island import Island

from .islands import UnitizedIsland
from .samples import Group
from .streams import Tap, find_capture

Place = tuple[str, int]
"""A unit: the path of its island, and its number there; several units of an island may have one name."""


class Importance:
    """The diagonal of the Fisher information of unit outputs: the mean squared gradient of the loss, over all samples.

    Args:
        sums: Sum of squared gradients and number of samples, by unit, output and shape of a sample.
    """

    def __init__(self, sums: dict[tuple[Place, int, tuple[int, ...]], list[Any]]) -> None:
        self._sums = sums

    @classmethod
    def measure(cls, model: Any, batches: list[Any], places: dict[Place, UnitizedIsland]) -> Importance:
        """Run the loss of a model on batches, forward and backward.

        Args:
            model: An OpenMMLab model, in the state of which the gradients are wanted.
            batches: Batches with annotations.
            places: Its units, in an order in which they can run, and their islands.

        Raises:
            ValueError: A model without loss, or data without annotations.
        """
        if not has_modes(model.architecture):
            raise ValueError("reconstruction.fisher: got True, but the model has no mode 'loss'; allowed: False")
        sums: dict[tuple[Place, int, tuple[int, ...]], list[Any]] = {}
        by_island: dict[str, list[tuple[Place, UnitizedIsland]]] = defaultdict(list)
        for place, island in places.items():
            by_island[place[0]].append((place, island))
        for batch in batches:
            _add_batch(model, batch, by_island, sums)
        return cls(sums)

    def of(self, place: Place, groups: list[Group]) -> list[dict[int, Tensor]]:
        """Give the weights of the squared errors of a unit, of mean 1.

        Args:
            place: The unit.
            groups: The samples.

        Returns:
            For each output, by its shape, tensors of the shape of one sample.
        """
        found: dict[int, dict[tuple[int, ...], Tensor]] = defaultdict(dict)
        for (unit, position, shape), (total, count) in self._sums.items():
            if unit == place:
                mean = total / count
                found[position][shape] = mean / mean.mean().clamp(min=1e-30)
        return [found.get(position, {}) for position in range(1 + max(found, default=-1))]


def _add_batch(model: Any, batch: Any, by_island: dict, sums: dict) -> None:
    outputs: list[tuple[Place, int, Tensor]] = []
    originals = {path: Island.of(model.architecture.get_submodule(path)) for path in by_island}
    try:
        for path, units in by_island.items():
            Tap(originals[path], _unit_by_unit(units, outputs)).install(model.architecture.get_submodule(path))
        with torch.enable_grad():
            data = model.data_preprocessor(batch, False)
            losses = _loss(model, data)
            losses.backward()
    finally:
        for path, island in originals.items():
            island.install(model.architecture.get_submodule(path))
    for place, position, value in outputs:
        if value.grad is not None:
            squares = value.grad.double().square().sum(0).float()
            entry = sums.setdefault((place, position, tuple(squares.shape)), [torch.zeros_like(squares), 0])
            entry[0] += squares
            entry[1] += len(value)


def _loss(model: Any, data: dict[str, Any]) -> Tensor:
    try:
        losses = model(**data, mode='loss')
    except Exception as error:
        raise ValueError(
            'reconstruction.fisher: the loss cannot be computed on the calibration data '
            f'({type(error).__name__}: {error}); allowed with data without annotations: False'
        ) from error
    total, _ = model.parse_losses(losses)
    return total


def _unit_by_unit(units: list[tuple[Place, UnitizedIsland]], outputs: list[tuple[Place, int, Tensor]]):
    def run(island: Island, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        found = find_capture(island, module, args, kwargs)
        unitized = units[0][1]
        if found is None or id(found[0]) not in unitized.units[0].by_kind:
            return island.run(module, args, kwargs)
        capture, inputs = found
        kind = id(capture)
        values = dict(zip(unitized.placeholders(kind), map(_with_grad, inputs)))
        for place, _ in units:
            unit = unitized.units[place[1]]
            own = unit.by_kind[kind]
            results = unit.functions[kind](*(_copied(values[node]) for node in own.inputs))
            for position, (node, result) in enumerate(zip(own.outputs, results)):
                if result.requires_grad:
                    result.retain_grad()
                    outputs.append((place, position, result))
                values[node] = result
        return torch.fx.node.map_arg(unitized.output(kind), values.__getitem__)

    return run


def _with_grad(value: Any) -> Any:
    is_leaf = isinstance(value, Tensor) and value.is_floating_point() and not value.requires_grad
    return value.detach().requires_grad_() if is_leaf else value


def _copied(value: Any) -> Any:
    """Copy a tensor, for units that work in place."""
    return value.clone() if isinstance(value, Tensor) else value
