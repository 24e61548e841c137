"""Evaluation of a deployed model beside the float and the fake-quantized one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmengine.runner import BaseLoop, Runner

from mmrazor_quant.arguments import check_integer
from mmrazor_quant.backends.deploy import check_backend, deployed, open_session
from mmrazor_quant.backends.simulation import arithmetic_of, simulated
from mmrazor_quant.codebases import codebase_of
from mmrazor_quant.engine.calibration import set_float, set_quantized
from mmrazor_quant.engine.comparison import comparison_table
from mmrazor_quant.engine.evaluation import evaluate
from mmrazor_quant.engine.loops.arguments import refuse_unknown
from mmrazor_quant.engine.quant_model import QuantModel, check_matched, unwrap_quant_model
from mmrazor_quant.graph.frozen import frozen_weights
from mmrazor_quant.registry import LOOPS


@LOOPS.register_module()
class DeployLoop(BaseLoop):
    """Evaluate a model three times on the same data: float, fake-quantized, and run by a backend.

    The fake-quantized one computes in the arithmetic of the backend, where that is known
    (:mod:`mmrazor_quant.backends.simulation`), otherwise as in training.

    Args:
        runner: Runner of a :class:`mmrazor_quant.algorithms.GeneralQuant` with a quantized checkpoint.
        dataloader: What to evaluate on.
        evaluator: Metrics.
        backend: Name of the backend.
        folder: Folder that ``tools/export.py`` wrote.
        threads: Threads of the backend.
    """

    def __init__(
        self, runner: Runner, dataloader: Any, evaluator: Any, backend: str, folder: str, threads: int = 1,
        **unknown: Any,
    ) -> None:  # fmt: skip
        refuse_unknown('test_cfg', DeployLoop, unknown)
        self.backend = backend
        check_backend(unwrap_quant_model(runner, 'test_cfg'), backend)
        self.session = open_session(backend, Path(folder), check_integer('test_cfg.threads', threads, 1))
        super().__init__(runner, dataloader)
        self.evaluator = evaluator if not isinstance(evaluator, (dict, list)) else runner.build_evaluator(evaluator)
        if getattr(self.dataloader.dataset, 'metainfo', None) is not None:
            self.evaluator.dataset_meta = self.dataloader.dataset.metainfo

    @property
    def model(self) -> QuantModel:
        """The quantized model, without data-parallel wrapper."""
        return unwrap_quant_model(self.runner, 'test_cfg')

    def run(self) -> dict[str, float]:
        """Evaluate.

        Returns:
            Metrics of the deployed model, those of the others as ``float/<name>`` and ``quantized/<name>``; for
            classifiers also ``agreement``, the percentage of images with the same class as fake-quantized.

        Raises:
            ValueError: If the model is not calibrated, or the checkpoint is of another qconfig.
        """
        check_matched(self.model, 'checkpoint')
        if not self.model.is_calibrated:
            raise ValueError('checkpoint: the model is not calibrated; give the quantized checkpoint of the export')
        expected: list[Any] = []
        classes: list[Any] = []
        set_float(self.model)
        found = {'float': self._evaluate(self.runner.model, 'Float evaluation')}
        found['quantized'] = self._evaluate_quantized(expected)
        stand_in = getattr(self.session, 'stand_in', None)
        heading = f'{self.backend} (stand-in)' if stand_in else self.backend
        found[self.backend] = self._evaluate(self._deployed(), f'Evaluation on {heading}', classes)
        self.runner.logger.info(
            f'Float, fake-quantized and deployed model on the same test data ({heading}):\n'
            + comparison_table(found['float'], found['quantized'], {heading: found[self.backend]})
        )
        if stand_in:
            self.runner.logger.warning(f'Not run by {self.backend}: {stand_in}')
        others = {f'{kind}/{k}': v for kind in ('float', 'quantized') for k, v in found[kind].items()}
        return {**found[self.backend], **others, **self._agreement(expected, classes)}

    def _evaluate_quantized(self, classes: list[Any]) -> dict[str, float]:
        arithmetic = arithmetic_of(self.backend)
        if arithmetic is not None:
            name = f'Quantized evaluation, in the arithmetic of {self.backend}'
            return self._evaluate(simulated(self.model, arithmetic), name, classes)
        set_quantized(self.model)
        with frozen_weights(self.model):
            return self._evaluate(self.runner.model, 'Quantized evaluation', classes)

    def _evaluate(self, model: Any, name: str, classes: list[Any] | None = None) -> dict[str, float]:
        """Evaluates a model; the classes of the images, if they have any, are appended to a list."""

        def watch(outputs: list[Any]) -> None:
            if classes is not None:
                classes.extend(codebase_of(self.model.architecture).classes(outputs) or [])

        return evaluate(model, self.dataloader, self.evaluator, name, watch=watch)

    def _agreement(self, expected: list[Any], found: list[Any]) -> dict[str, float]:
        if not expected:
            return {}
        same = 100 * sum(a == b for a, b in zip(expected, found, strict=True)) / len(expected)
        self.runner.logger.info(f'Same class as fake-quantized: {same:.2f} % of {len(expected)} images')
        return {'agreement': same}

    def _deployed(self) -> Any:
        batch = next(iter(self.dataloader))
        images = self.model.data_preprocessor(batch, False)['inputs']
        return deployed(self.model.architecture, self.session, images[:1])
