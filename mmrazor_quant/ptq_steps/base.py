"""What all optional steps of post-training quantization share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sized
from dataclasses import dataclass
from enum import Enum
from itertools import islice
from typing import Any, ClassVar, Protocol

from torch import nn

from mmrazor_quant.engine.quant_model import QuantModel
from mmrazor_quant.graph.insert import Inserted


class Stage(Enum):
    """When a step runs."""

    BEFORE_CALIBRATION = 'before calibration'
    AFTER_WEIGHTS = 'after the ranges of the weights are set, before activations are observed'
    AFTER_CALIBRATION = 'after calibration, and after reconstruction if there is one'


class StepModel(QuantModel, Protocol):
    """What the steps ask of :class:`mmrazor_quant.algorithms.GeneralQuant` in addition to what the loops do.

    Attributes:
        architecture: the model whose graphs were captured.
        inserted: its quantizers, by path below the architecture.
    """

    architecture: nn.Module
    inserted: Inserted

    def test_step(self, data: Any) -> Any:
        """Runs the model on a batch of a dataloader."""


def has_what_steps_need(model: nn.Module) -> bool:
    """Tells whether a model has what :class:`StepModel` asks for and not every model of mmengine has.

    From Python 3.12 on, ``isinstance`` with a protocol does not see modules inside modules, as ``architecture`` is one.
    """
    return isinstance(model, QuantModel) and all(hasattr(model, name) for name in ('architecture', 'inserted'))


@dataclass(frozen=True)
class StepContext:
    """What a step works on.

    Args:
        model: the quantized model, in eval mode.
        data: calibration data, batches as ``model.test_step`` takes them; not the same ones in each
            iteration if they are augmented at random.
        limit: number of batches to use, at most.
    """

    model: StepModel
    data: Iterable[Any]
    limit: int

    def batches(self) -> Iterator[Any]:
        """Yields the batches to use."""
        return islice(self.data, self.limit)

    @property
    def count(self) -> int:
        """Number of batches to use; an upper bound where the data do not tell how many they are."""
        return min(self.limit, len(self.data)) if isinstance(self.data, Sized) else self.limit


class PTQStep(ABC):
    """Base of the steps that :class:`mmrazor_quant.engine.PTQLoop` runs besides calibration.

    Attributes:
        stage: when it runs.
        changes_float: whether the float model computes something else afterwards.
    """

    stage: ClassVar[Stage]
    changes_float: ClassVar[bool] = False

    @abstractmethod
    def run(self, context: StepContext) -> None:
        """Changes the model in place, and logs what was done."""
