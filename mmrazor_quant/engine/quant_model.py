"""What the loops ask of a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.runner import Runner
from torch import nn


@runtime_checkable
class QuantModel(Protocol):
    """The methods of :class:`mmrazor_quant.algorithms.GeneralQuant` that the loops call."""

    is_calibrated: bool

    unmatched: Mapping[str, str]
    """Quantizers that the checkpoint loaded last does not fit, with the reason; empty for a float checkpoint."""

    def set_quant_state(
        self,
        weight_observer: bool | None = None,
        weight_fake_quant: bool | None = None,
        act_observer: bool | None = None,
        act_fake_quant: bool | None = None,
    ) -> None:
        """Switch observers and fake quantizers; None leaves them."""

    def observe_weights(self) -> None:
        """Set the qparams of all weights from the weights as they are now."""

    def compute_act_qparams(self) -> None:
        """Set the qparams of all activations from what their observers have seen."""

    def reset_observers(self) -> None:
        """Forget everything that was observed."""

    def mark_calibrated(self) -> None:
        """Set ``is_calibrated``, which the state dict keeps."""

    def freeze_bn(self, frozen: bool) -> None:
        """Have batch normalization use and keep its running statistics."""


def check_matched(model: QuantModel, field: str) -> None:
    """Refuse a model whose checkpoint is of other quantizers.

    Args:
        model: Model.
        field: What names the checkpoint, for the error.

    Raises:
        ValueError: The checkpoint was made with another qconfig.
    """
    if model.unmatched:
        path, reason = next(iter(model.unmatched.items()))
        raise ValueError(
            f'{field}: the checkpoint was made with another quantizer.qconfig; {len(model.unmatched)} quantizers '
            f'differ, such as {path}: {reason}'
        )


def bare_model(runner: Runner) -> nn.Module:
    """Get the model of a runner out of its wrappers, for data parallelism or test-time augmentation, if it has any.

    Args:
        runner: Runner with a built model.

    Returns:
        The model.
    """
    model = runner.model
    while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
        model = model.module
    return model


def unwrap_quant_model(runner: Runner, field: str) -> QuantModel:
    """Get the quantized model of a runner out of its wrappers.

    Args:
        runner: Runner with a built model.
        field: Config field that asks for a quantized model, for the error.

    Returns:
        The model.

    Raises:
        TypeError: If the model is not a GeneralQuant or something with the same methods.
    """
    model = bare_model(runner)
    if not isinstance(model, QuantModel):
        raise TypeError(
            f'{field} needs a quantized model: model.type must be mmrazor.GeneralQuant (or a class with the same '
            f'methods), but the model is a {type(model).__name__}'
        )
    return model
