"""The reconstruction of a model, island by island and unit by unit."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import all_gather_object, get_rank
from mmengine.logging import MMLogger
from torch import Tensor, nn

from mmrazor_quant import ops
from mmrazor_quant.engine.randomness import seed_from
from mmrazor_quant.fake_quants import AdaRoundFakeQuantize, LearnedFakeQuantize
from mmrazor_quant.graph.insert import WeightSite
from mmrazor_quant.tracing.island import islands_of

from .cache import ActivationCache
from .importance import Importance, Place
from .islands import NO_GRAPH, Flow, UnitizedIsland, UnitOfGroups, log_whole
from .learning import Learner, UnitData
from .mirror import mirrored
from .progress import Progress, Timer, UnitReport, plan_table
from .resume import FinishedUnits, fingerprint
from .samples import Call
from .settings import Settings
from .streams import Stream, Survey
from .weights import Weight

RECONSTRUCTION_SEED = 101
"""First number of the key of all seeds here."""


@dataclass
class Task:
    """A unit of an island in the plan.

    Args:
        path: The island.
        island: The same, with its units.
        index: Number of the unit in the island.
        weights: Weights to learn the rounding of, by path of their quantizers.
        quantizers: Activation quantizers that no earlier unit has, by path.
    """

    path: str
    island: UnitizedIsland
    index: int
    weights: dict[str, Weight]
    quantizers: dict[str, nn.Module]

    @property
    def unit(self) -> UnitOfGroups:
        """The unit."""
        return self.island.units[self.index]

    @property
    def place(self) -> Place:
        """What tells the unit from all others."""
        return self.path, self.index

    @property
    def name(self) -> str:
        """Path of the unit in the model; several may have one."""
        return f'{self.path}.{self.unit.first.name}'.strip('.') or 'model'

    @property
    def modules(self) -> dict[str, nn.Module]:
        """All quantizers whose state is learned, by path."""
        return {**{path: weight.quantizer for path, weight in self.weights.items()}, **self.quantizers}

    @property
    def size(self) -> int:
        """Number of weights."""
        return sum(weight.value.numel() for weight in self.weights.values())

    def cost(self) -> float:
        """Estimate the work of a sample: multiplications in the graph's examples."""
        total = 1.0
        for node in self.unit.first.nodes:
            shape = node.meta.get('shape', ())
            if node.meta.get('shape') and len(shape) > 2:
                total += math.prod(shape[1:])
        return total


class Engine:
    """Reconstructs a calibrated model.

    Args:
        model: A :class:`mmrazor_quant.algorithms.GeneralQuant`, calibrated.
        batches: Calibration batches, as ``model.test_step`` takes them.
        settings: How.
        folder: Folder for files of its own, and the logs.
    """

    def __init__(self, model: Any, batches: list[Any], settings: Settings, folder: str | Path) -> None:
        self.model, self.batches, self.settings, self.folder = model, batches, settings, Path(folder)
        self.logger = MMLogger.get_current_instance()
        self.cache = ActivationCache(settings.cache_bytes, self.folder / 'reconstruction_cache')
        self.architecture: nn.Module = model.architecture
        self.finished: FinishedUnits | None = None

    def run(self) -> list[UnitReport]:
        """Reconstruct the model.

        Returns:
            What became of each unit.

        Raises:
            ValueError: There is nothing to learn, or there are no data.
        """
        if not self.batches:
            raise ValueError('reconstruction: there are no calibration batches')
        self.model.eval()
        with self._frozen_parameters(), ops.immediate_mode():
            try:
                return self._run()
            finally:
                self.cache.close()
                self._set_state(True)

    def clean_up(self) -> None:
        """Remove the files to resume from."""
        if self.finished is not None:
            self.finished.remove()

    def _run(self) -> list[UnitReport]:
        islands = islands_of(self.architecture)
        batches = [*self.batches, *map(mirrored, self.batches)] if self.settings.mirror else self.batches
        floating, quantized = (Stream(self.model.test_step, batches, islands, self.cache) for _ in range(2))
        self._set_state(False)
        surveys = floating.survey()
        tasks = self._plan(islands, surveys)
        self._check(tasks)
        rows = [(t.name, len(t.unit.first.weights), t.size, _shapes(t.unit)) for t in tasks]
        self.logger.info(f'Reconstruction by {self.settings.describe()}; units:\n{plan_table(rows)}')
        self.progress = Progress([task.cost() * self.settings.iters for task in tasks], self.folder)
        self.importance = self._find_importance(tasks, islands)
        for path, survey in surveys.items():
            mine = [(i, task) for i, task in enumerate(tasks) if task.path == path]
            if mine:
                self._island(path, survey.counts, floating, quantized, mine)
        return self.progress.reports

    # -- plan ------------------------------------------------------------------------------------------------------

    def _plan(self, islands: dict[str, nn.Module], surveys: dict[str, Survey]) -> list[Task]:
        tasks: list[Task] = []
        seen: set[int] = set()
        sites = {site.quantizer: site for site in self.model.inserted.weights}
        for path, survey in surveys.items():
            island = UnitizedIsland(islands[path], self.settings.granularity)
            try:
                island.plan(list(survey.kinds))
            except ValueError as error:
                log_whole(path, str(error))
                continue
            for index, unit in enumerate(island.units):
                task = Task(path, island, index, {}, {})
                for name in unit.first.weights:
                    self._add_weight(task, sites.get(f'{path}.{name}'.strip('.')), seen)
                for name in unit.first.quantizers:
                    self._add_quantizer(task, f'{path}.{name}'.strip('.'), seen)
                tasks.append(task)
        return tasks

    def _add_weight(self, task: Task, site: WeightSite | None, seen: set[int]) -> None:
        if site is None:  # a computed weight, which has no values of its own to round
            return
        quantizer = self.architecture.get_submodule(site.quantizer)
        if isinstance(quantizer, AdaRoundFakeQuantize) and id(quantizer) not in seen:
            seen.add(id(quantizer))
            task.weights[site.quantizer] = Weight(quantizer, site.value(self.architecture).detach())

    def _add_quantizer(self, task: Task, path: str, seen: set[int]) -> None:
        quantizer = self.architecture.get_submodule(path)
        if isinstance(quantizer, LearnedFakeQuantize) and id(quantizer) not in seen:
            seen.add(id(quantizer))
            task.quantizers[path] = quantizer

    def _check(self, tasks: list[Task]) -> None:
        plans = all_gather_object([(task.name, *task.modules) for task in tasks])
        if not any(task.weights for task in tasks) and not any(task.quantizers for task in tasks):
            raise ValueError(
                'reconstruction: nothing to learn; set qconfig.w_fake_quant.type to mmrazor.AdaRoundFakeQuantize, or '
                'qconfig.a_fake_quant.type to mmrazor.QDropFakeQuantize'
            )
        for rank, plan in enumerate(plans):
            if plan != plans[0]:
                own, other = (sorted(unit[0] for unit in each) for each in (plans[0], plan))
                raise ValueError(
                    f'reconstruction: process {rank} has other units than process 0 ({other}, {own}): its calibration '
                    'data call the model in another way; allowed: one process, or data alike'
                )

    # -- an island -------------------------------------------------------------------------------------------------

    def _island(
        self, path: str, counts: Counter[int], floating: Stream, quantized: Stream, tasks: list[tuple[int, Task]]
    ) -> None:
        island = tasks[0][1].island
        self._set_state(False)
        float_calls = floating.calls(path, counts, island.serves)
        if not float_calls:
            log_whole(path, NO_GRAPH)
            return
        self._log_left_out(path, sum(counts.values()) - len(float_calls), sum(counts.values()))
        if self.finished is None:
            self.finished = FinishedUnits(self.folder / 'reconstruction', self._fingerprint(float_calls, tasks))
        self._set_state(True)
        quantized_calls = quantized.calls(path, counts, island.serves)
        if not _alike(float_calls, quantized_calls):
            # What is selected between islands, such as proposals, differs between both.
            _free(quantized_calls, self.cache)
            quantized_calls = [Call(*call.key, self._copies(call.inputs), call.kind) for call in float_calls]
        groups = island.start(quantized_calls)
        flows = [Flow(island, groups, self.cache) for _ in range(2)]
        for flow, calls in zip(flows, (float_calls, quantized_calls)):
            flow.take_inputs({call.key: call for call in calls})
        for index, task in tasks:
            self._unit(index, task, *flows)
        floating.finish(path, flows[0].outputs())
        quantized.finish(path, flows[1].outputs())

    def _log_left_out(self, path: str, left_out: int, total: int) -> None:
        if left_out:
            self.logger.warning(f'Reconstruction of {path or "the model"} leaves out {left_out} of {total} calls')

    def _copies(self, inputs: list[Any]) -> list[Any]:
        return [self.cache.copy(x) if isinstance(x, Tensor) else x for x in inputs]

    def _unit(self, index: int, task: Task, floating: Flow, quantized: Flow) -> None:
        timer = Timer()
        unit = task.unit
        resumed = index < self.finished.count
        mixing = self.settings.drop_prob > 0 and not resumed
        with _switched_off(task, self.architecture):
            targets = floating.run(unit)
        inputs = floating.inputs(unit)
        floating.keep(unit, targets)
        if not mixing:
            floating.release(task.index + 1)
        data = UnitData(
            functions=[unit.functions[group.kind] for group in quantized.groups],
            groups=quantized.groups,
            quantized=quantized.inputs(unit),
            floating=inputs if mixing else None,
            targets=targets,
            importance=None if self.importance is None else self.importance.of(task.place, quantized.groups),
            weights=list(task.weights.values()),
            quantizers=list(task.quantizers.values()),
        )
        report = self._resume(index, task) if resumed else self._learn(index, task, data, timer)
        if mixing:
            floating.release(task.index + 1)
        quantized.keep(unit, quantized.run(unit))
        quantized.release(task.index + 1)
        if not resumed:
            self.finished.save(index, _states(task), report)
        self.progress.add(report, resumed)

    def _learn(self, index: int, task: Task, data: UnitData, timer: Timer) -> UnitReport:
        before = _states(task)
        learner = Learner(data, self.settings, seed_from(RECONSTRUCTION_SEED, self.settings.seed, index, get_rank()))
        losses = [learner.loss()]
        learner.run()
        losses.append(learner.loss())
        kept = losses[1] <= losses[0]
        if not kept:
            _load_states(task, before)
        layers = len(task.unit.first.weights)
        return UnitReport(task.name, layers, task.size, *losses, kept, learner.undecided, timer.seconds)

    def _resume(self, index: int, task: Task) -> UnitReport:
        states, report = self.finished.load(index)
        _load_states(task, states)
        return report

    def _fingerprint(self, calls: list[Call], tasks: list[tuple[int, Task]]) -> str:
        state = sorted(self.model.state_dict().items())
        return fingerprint(
            self.settings, get_rank(), [call.inputs for call in calls], [[key, value] for key, value in state]
        )

    def _find_importance(self, tasks: list[Task], islands: dict[str, nn.Module]) -> Importance | None:
        if not self.settings.fisher:
            return None
        self._set_state(False)
        return Importance.measure(self.model, self.batches, {task.place: task.island for task in tasks})

    # -- state of the model ----------------------------------------------------------------------------------------

    def _set_state(self, quantized: bool) -> None:
        self.model.set_quant_state(False, quantized, False, quantized)

    @contextmanager
    def _frozen_parameters(self) -> Iterator[None]:
        before = [(p, p.requires_grad) for p in self.model.parameters()]
        try:
            for parameter, _ in before:
                parameter.requires_grad_(False)
            yield
        finally:
            for parameter, required in before:
                parameter.requires_grad_(required)


@contextmanager
def _switched_off(task: Task, architecture: nn.Module) -> Iterator[None]:
    """Run a unit in float inside this context."""
    prefix = f'{task.path}.' if task.path else ''
    names = (*task.unit.first.weights, *task.unit.first.quantizers)
    quantizers = [architecture.get_submodule(prefix + name) for name in names]
    for quantizer in quantizers:
        quantizer.enable_fake_quant(False)
    try:
        yield
    finally:
        for quantizer in quantizers:
            quantizer.enable_fake_quant(True)


def _states(task: Task) -> dict[str, dict[str, Tensor]]:
    return {path: {name: t.detach().clone() for name, t in _learned(module)} for path, module in task.modules.items()}


def _learned(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield what reconstruction changes in a quantizer."""
    if isinstance(module, AdaRoundFakeQuantize):
        yield 'integers', module.integers
        yield 'scale', module.scale
    else:
        yield from module.named_parameters(recurse=False)


@torch.no_grad()
def _load_states(task: Task, states: dict[str, dict[str, Tensor]]) -> None:
    for path, module in task.modules.items():
        for name, value in states[path].items():
            if name == 'integers':
                module.set_integers(value)
            else:
                getattr(module, name).copy_(value)


def _alike(one: list[Call], other: list[Call]) -> bool:
    def shapes(calls: list[Call]) -> list[tuple]:
        return [(c.key, c.kind, [(x.shape, x.dtype) if isinstance(x, Tensor) else x for x in c.inputs]) for c in calls]

    return shapes(one) == shapes(other)


def _free(calls: list[Call], cache: ActivationCache) -> None:
    for call in calls:
        for value in call.inputs:
            if isinstance(value, Tensor):
                cache.free(value)


def _shapes(unit: UnitOfGroups) -> str:
    shapes = (node.meta.get('shape', ()) for node in unit.first.outputs)
    return ', '.join('x'.join(map(str, shape[1:])) for shape in shapes)
