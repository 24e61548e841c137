"""Post-training quantization as a test loop."""

from __future__ import annotations

import os.path as osp
from collections.abc import Sequence
from itertools import islice
from typing import Any

from mmengine.evaluator import Evaluator
from mmengine.hooks import EMAHook
from mmengine.runner import Runner, TestLoop
from mmengine.runner.loops import _parse_losses
from torch.utils.data import DataLoader

from mmrazor_quant.arguments import check_integer
from mmrazor_quant.engine.calibration import (
    build_calibration_dataloader,
    build_dataloader,
    calibrate,
    set_float,
    set_quantized,
)
from mmrazor_quant.engine.checkpoint import save_quantized_checkpoint
from mmrazor_quant.engine.comparison import comparison_table
from mmrazor_quant.engine.evaluation import evaluate
from mmrazor_quant.engine.loops.arguments import refuse_unknown
from mmrazor_quant.engine.loops.rfc import reconstruction_of_rfc
from mmrazor_quant.engine.memory import keep_freed_memory
from mmrazor_quant.engine.quant_model import QuantModel, unwrap_quant_model
from mmrazor_quant.graph.frozen import frozen_weights
from mmrazor_quant.ptq_steps import Stage, StepContext, build_steps
from mmrazor_quant.registry import LOOPS, TASK_UTILS


@LOOPS.register_module()
class PTQLoop(TestLoop):
    """Calibrate, save the quantized checkpoint, evaluate float and quantized; with a quantized checkpoint: evaluate.

    The checkpoint, ``quantized.pth`` in the work directory, is written before the evaluation, so that interrupting
    that loses nothing: ``tools/test.py CONFIG quantized.pth`` evaluates it.

    Args:
        runner: Runner of a :class:`mmrazor_quant.algorithms.GeneralQuant`.
        dataloader: What to evaluate on.
        evaluator: Metrics.
        fp16: Evaluate in automatic mixed precision. Calibration is always done in the precision of the weights.
        calibrate_dataloader: Dataloader to calibrate on. None: the dataset of ``train_dataloader`` with the
            transforms of ``test_dataloader`` (no random augmentation), in an order shuffled by ``calibrate_seed``.
        calibrate_steps: Number of batches to calibrate on.
        calibrate_weights_quantized: Observe activations behind quantized weights instead of float ones.
        calibrate_seed: Seed of the order of the default calibration data, the same in every run.
        save_as: File name of the quantized checkpoint in the work directory.
        reconstruction: Config of a reconstruction of weights and activations after the calibration, on its batches:
            ``type`` ``mmrazor.AdaRound``, ``mmrazor.BRECQ`` or ``mmrazor.QDrop``, and what differs from its defaults
            (:class:`mmrazor_quant.reconstruction.Settings`). None: none.
        extra_steps: Configs of further steps (:mod:`mmrazor_quant.ptq_steps`). When each of them runs is its own
            affair, whatever the order of the list: cross-layer equalization before calibration, ranges of weights
            within it, before activations are observed, bias correction after it (and after reconstruction).
        batch_num: What the RFC calls ``calibrate_steps``.
        reconstruction_cfg: What the RFC calls ``reconstruction``, in its form
            (:func:`mmrazor_quant.engine.loops.rfc.reconstruction_of_rfc`).

    Example:
        >>> test_cfg = dict(type='mmrazor.PTQLoop', calibrate_steps=32)
    """

    def __init__(
        self,
        runner: Runner,
        dataloader: DataLoader | dict,
        evaluator: Evaluator | dict | list,
        fp16: bool = False,
        calibrate_dataloader: DataLoader | dict | None = None,
        calibrate_steps: int = 32,
        calibrate_weights_quantized: bool = False,
        calibrate_seed: int = 0,
        save_as: str = 'quantized.pth',
        reconstruction: dict | None = None,
        extra_steps: Sequence[dict] | None = None,
        batch_num: int | None = None,
        reconstruction_cfg: dict | None = None,
        **unknown: Any,
    ) -> None:
        refuse_unknown('test_cfg', PTQLoop, unknown)
        if batch_num is not None:
            calibrate_steps = check_integer('test_cfg.batch_num', batch_num, 1)
        if reconstruction_cfg is not None:
            reconstruction = reconstruction_of_rfc(reconstruction_cfg)
        self.calibrate_steps = check_integer('test_cfg.calibrate_steps', calibrate_steps, 1)
        self.calibrate_seed = check_integer('test_cfg.calibrate_seed', calibrate_seed, 0)
        self.calibrate_weights_quantized = calibrate_weights_quantized
        self.save_as = save_as
        self.reconstruction = _build_reconstruction(reconstruction)
        self._calibrate_dataloader = calibrate_dataloader
        self._dataloader_config = dataloader
        model = unwrap_quant_model(runner, "test_cfg.type='mmrazor.PTQLoop'")
        self.extra_steps = build_steps(extra_steps, model, 'test_cfg.extra_steps')
        super().__init__(runner, dataloader, evaluator, fp16=fp16)

    @property
    def model(self) -> QuantModel:
        """The quantized model, without data-parallel wrapper."""
        return unwrap_quant_model(self.runner, 'test_cfg')

    def run(self) -> dict[str, float]:
        """Calibrate if that was not done yet, and evaluate.

        Returns:
            Metrics of the quantized model, and those of the float model as ``float/<name>`` if it calibrated.

        Raises:
            ValueError: If there are no data to calibrate on, or they make ranges that are not finite.
            RuntimeError: If the calibration data cannot be read.
        """
        keep_freed_memory()
        if self.model.is_calibrated:
            self.runner.logger.info('The model is calibrated already: evaluating only')
            return self._evaluate_quantized({})
        # A step may change what the float model computes.
        float_metrics = self._evaluate_float() if self.extra_steps.change_float else None
        self.calibrate()
        float_metrics = self._evaluate_float() if float_metrics is None else float_metrics
        metrics = self._evaluate_quantized(float_metrics)
        self.runner.logger.info(
            'Float and quantized model on the same test data:\n' + comparison_table(float_metrics, metrics)
        )
        return metrics

    def calibrate(self) -> None:
        """Calibrate the model, reconstruct it if asked for, and save it."""
        field = 'test_cfg.calibrate_dataloader'
        batches, source = self._build_calibration_data(field)
        self.runner.logger.info(f'Calibrating on {source}, up to {self.calibrate_steps} batches')
        if self.reconstruction is not None and len(batches) > 0:
            # Kept: both go over the same data, and reconstruction does so several times.
            batches = list(islice(batches, self.calibrate_steps))
        context = StepContext(self.model, batches, self.calibrate_steps)
        self.model.eval()
        self.extra_steps.run(Stage.BEFORE_CALIBRATION, context)
        calibrate(
            self.model, batches, self.calibrate_steps, source, self.calibrate_weights_quantized,
            lambda: self.extra_steps.run(Stage.AFTER_WEIGHTS, context),
        )  # fmt: skip
        if self.reconstruction is not None:
            self.reconstruction.run(self.model, batches, self.runner.work_dir)
        self.extra_steps.run(Stage.AFTER_CALIBRATION, context)
        path = osp.join(self.runner.work_dir, self.save_as)
        save_quantized_checkpoint(self.runner, self.model, path, getattr(self.dataloader.dataset, 'metainfo', None))
        self.runner.logger.info(f'Saved the quantized checkpoint {path}')
        if self.reconstruction is not None:
            self.reconstruction.clean_up()
        self._update_ema_copies()

    def _build_calibration_data(self, field: str) -> tuple[DataLoader, str]:
        """Build the calibration data; returns them and the config field that they come from."""
        if self._calibrate_dataloader is None:
            loader = build_calibration_dataloader(self.runner, self._dataloader_config, field, self.calibrate_seed)
            return loader, 'train_dataloader'
        return build_dataloader(self.runner, self._calibrate_dataloader, field, field, self.calibrate_seed), field

    def _update_ema_copies(self) -> None:
        """Bring copies of the model up to date: EMAHook swaps its own, made before calibration, in for the test."""
        for hook in self.runner.hooks:
            if isinstance(hook, EMAHook):
                hook.ema_model.module.load_state_dict(self.model.state_dict())

    def _evaluate_float(self) -> dict[str, float]:
        """Evaluate the float model, without hooks: they belong to the evaluation of the quantized one."""
        set_float(self.model)
        return evaluate(self.runner.model, self.dataloader, self.evaluator, 'Float evaluation', self.fp16)

    def _evaluate_quantized(self, float_metrics: dict[str, float]) -> dict[str, float]:
        """Evaluate the quantized model as mmengine's TestLoop does, hooks included.

        Args:
            float_metrics: Metrics of the float model, to hand to the hooks as ``float/<name>``.

        Returns:
            All metrics.
        """
        set_quantized(self.model)
        self.runner.call_hook('before_test')
        self.runner.call_hook('before_test_epoch')
        self.runner.model.eval()
        self.test_loss.clear()
        with frozen_weights(self.model):
            for idx, data_batch in enumerate(self.dataloader):
                self.run_iter(idx, data_batch)
        metrics = self.evaluator.evaluate(len(self.dataloader.dataset))
        if self.test_loss:
            metrics.update(_parse_losses(self.test_loss, 'test'))
        metrics.update({f'float/{name}': value for name, value in float_metrics.items()})
        self.runner.call_hook('after_test_epoch', metrics=metrics)
        self.runner.call_hook('after_test')
        return metrics


def _build_reconstruction(config: dict | None) -> Any:
    """Build a reconstruction, saying which field of the config is wrong."""
    if config is None:
        return None
    field = 'test_cfg.reconstruction'
    if not isinstance(config, dict) or 'type' not in config:
        raise ValueError(f'{field}: got {config!r}, allowed: None, or a dict with a type')
    config = dict(config)
    name = config.pop('type')
    method = TASK_UTILS.get(name)
    if method is None:
        raise ValueError(f'{field}.type: got {name!r}, allowed: mmrazor.AdaRound, mmrazor.BRECQ, mmrazor.QDrop')
    try:
        return method(**config)
    except ValueError as error:
        raise ValueError(f'test_cfg.{error}') from error
