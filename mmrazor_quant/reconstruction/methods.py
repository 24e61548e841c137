"""The methods that a config can name: settings of one engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from mmrazor_quant.registry import TASK_UTILS

from .engine import Engine
from .progress import UnitReport
from .settings import Settings


class Reconstruction:
    """Base of the methods.

    Args:
        **settings: What differs from the method's defaults, by the names of :class:`Settings`.

    Attributes:
        settings: All settings.
        reports: What became of each unit, after a run.

    Raises:
        ValueError: An unknown field or a value that is not allowed, naming the field.
    """

    defaults: ClassVar[dict[str, Any]] = {}

    def __init__(self, **settings: Any) -> None:
        known = Settings.__dataclass_fields__
        unknown = sorted(set(settings) - set(known))
        if unknown:
            raise ValueError(
                f'reconstruction of type {type(self).__name__} has no field {", ".join(map(repr, unknown))}; '
                f'known are {", ".join(known)}'
            )
        self.settings = Settings(**{**self.defaults, **settings})
        self.reports: list[UnitReport] = []

    def run(self, model: Any, batches: list[Any], folder: str | Path) -> list[UnitReport]:
        """Reconstruct a calibrated model.

        Args:
            model: A :class:`mmrazor_quant.algorithms.GeneralQuant`.
            batches: Calibration batches as ``model.test_step`` takes them.
            folder: Folder for logs and for files to resume from.

        Returns:
            What became of each unit.
        """
        self._engine = Engine(model, batches, self.settings, folder)
        self.reports = self._engine.run()
        return self.reports

    @property
    def cache_peak(self) -> int:
        """The most bytes of activations that were cached in memory."""
        return self._engine.cache.peak

    def clean_up(self) -> None:
        """Remove the files to resume from, once the result is saved."""
        self._engine.clean_up()


@TASK_UTILS.register_module()
class AdaRound(Reconstruction):
    """Rounding learned layer by layer (Nagel et al. 2020, "Up or Down? Adaptive Rounding ...").

    Args:
        **settings: See :class:`Settings`.
    """

    defaults: ClassVar[dict[str, Any]] = dict(granularity='layer')


@TASK_UTILS.register_module()
class BRECQ(Reconstruction):
    """Rounding learned block by block (Li et al. 2021, "BRECQ: Pushing the Limit of ...").

    Args:
        **settings: See :class:`Settings`.
    """

    defaults: ClassVar[dict[str, Any]] = dict(granularity='block')


@TASK_UTILS.register_module()
class QDrop(Reconstruction):
    """Block by block, with randomly dropped quantization of activations (Wei et al. 2022, "QDrop: Randomly ...").

    Args:
        **settings: See :class:`Settings`.
    """

    defaults: ClassVar[dict[str, Any]] = dict(granularity='block', drop_prob=0.5)
