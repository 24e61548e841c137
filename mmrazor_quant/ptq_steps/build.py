"""From configs to steps."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from mmrazor_quant.registry import TASK_UTILS

from .base import PTQStep, Stage, StepContext, has_what_steps_need


class PTQSteps:
    """The steps of one config.

    Args:
        steps: the steps; those of one stage run in this order.
    """

    def __init__(self, steps: Sequence[PTQStep] = ()) -> None:
        self.steps = tuple(steps)

    @property
    def change_float(self) -> bool:
        """Whether the float model computes something else after them."""
        return any(step.changes_float for step in self.steps)

    def run(self, stage: Stage, context: StepContext) -> None:
        """Runs the steps of one stage.

        Args:
            stage: the stage that was reached.
            context: model and calibration data.
        """
        for step in self.steps:
            if step.stage is stage:
                step.run(context)


def build_steps(configs: Any, model: Any, field: str) -> PTQSteps:
    """Builds steps, telling what is wrong with their configs.

    Args:
        configs: list of dicts with ``type`` and arguments; None for no steps.
        model: the model that they are for.
        field: config field of the list, for the errors.

    Returns:
        The steps.

    Raises:
        ValueError: an unknown type or argument, or a value that a step does not take.
        TypeError: a list, or a model of another type, is needed.
    """
    configs = () if configs is None else configs
    if isinstance(configs, (str, Mapping)) or not isinstance(configs, Sequence):
        raise TypeError(f'{field}: got {configs!r}, allowed: a list of dicts with a type out of {_known()}')
    if configs and not has_what_steps_need(model):
        raise TypeError(f'{field}: got a {type(model).__name__}, allowed: mmrazor.GeneralQuant and classes like it')
    return PTQSteps([_build(config, f'{field}[{i}]') for i, config in enumerate(configs)])


def _build(config: Any, field: str) -> PTQStep:
    if isinstance(config, PTQStep):
        return config
    if not isinstance(config, Mapping) or 'type' not in config:
        raise ValueError(f'{field}: got {config!r}, allowed: a dict with a type out of {_known()}')
    arguments = dict(config)
    kind = arguments.pop('type')
    found = kind if inspect.isclass(kind) else TASK_UTILS.get(kind)
    if not inspect.isclass(found) or not issubclass(found, PTQStep):
        raise ValueError(f'{field}.type: got {kind!r}, allowed: {_known()}, and classes like them')
    allowed = list(inspect.signature(found).parameters)
    for name in arguments:
        if name not in allowed:
            raise ValueError(f'{field}.{name}: {found.__name__} has no such field; allowed: {", ".join(allowed)}')
    try:
        return found(**arguments)
    except ValueError as error:
        raise ValueError(f'{field}.{error}') from error


def _known() -> str:
    classes = {name: kind for name, kind in TASK_UTILS.module_dict.items() if inspect.isclass(kind)}
    return ', '.join(sorted(f'mmrazor.{name}' for name, kind in classes.items() if issubclass(kind, PTQStep)))
