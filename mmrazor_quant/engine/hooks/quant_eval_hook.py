"""Evaluate a quantized model with mmengine's own validation and test loops."""

from __future__ import annotations

from collections.abc import Callable

from mmengine.dist import broadcast
from mmengine.hooks import Hook
from mmengine.runner import Runner

from mmrazor_quant.engine.calibration import set_quantized
from mmrazor_quant.engine.quant_model import unwrap_quant_model
from mmrazor_quant.registry import HOOKS


@HOOKS.register_module()
class QuantEvalHook(Hook):
    """Keep the observers off during validation and test, which must not change the ranges of the model.

    The QAT loops register it by themselves, and ``tools/test.py`` does for a test loop other than ``PTQLoop``.

    Args:
        after_val: Called when a validation has ended, to switch the observers on again.
    """

    # After EMAHook, which exchanges the buffers of two models, the switches of the observers among them.
    priority = 'LOW'

    def __init__(self, after_val: Callable[[], None] | None = None) -> None:
        self._after_val = after_val

    def before_val_epoch(self, runner: Runner) -> None:
        """Switch the observers off; the model is evaluated as far quantized as it is being trained.

        Args:
            runner: Runner of the model.
        """
        model = unwrap_quant_model(runner, 'mmrazor.QuantEvalHook')
        for buffer in model.buffers():
            # What is a rank's own, such as statistics of batch norms, is saved by rank 0.
            broadcast(buffer, src=0)
        model.set_quant_state(weight_observer=False, act_observer=False)

    def after_val_epoch(self, runner: Runner, metrics: dict | None = None) -> None:
        """Give back control over the observers.

        Args:
            runner: Runner of the model.
            metrics: Results of the validation.
        """
        if self._after_val is not None:
            self._after_val()

    def before_test(self, runner: Runner) -> None:
        """Check that there is something quantized to test.

        Args:
            runner: Runner of the model.

        Raises:
            ValueError: If the model was never calibrated.
        """
        if not unwrap_quant_model(runner, 'mmrazor.QuantEvalHook').is_calibrated:
            raise ValueError(
                'test_cfg: this test loop evaluates quantized models, and the model is not calibrated. '
                "Give a quantized checkpoint, or set test_cfg=dict(type='mmrazor.PTQLoop') to "
                'calibrate before the evaluation'
            )

    def before_test_epoch(self, runner: Runner) -> None:
        """Quantize, with the observers off.

        Args:
            runner: Runner of the model.
        """
        set_quantized(unwrap_quant_model(runner, 'mmrazor.QuantEvalHook'))
