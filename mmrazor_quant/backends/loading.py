"""Building a quantized model for a backend."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmengine.runner import load_checkpoint

from mmrazor_quant.engine.checkpoint import check_checkpoint, check_checkpoint_matches
from mmrazor_quant.engine.quant_model import QuantModel, check_matched
from mmrazor_quant.registry import MODELS

from .deploy import check_backend


def load_quantized(config: Mapping[str, Any], checkpoint: str, backend: str, field: str = '--backend') -> QuantModel:
    """Builds a quantized model and loads its checkpoint.

    Args:
        config: config of the model.
        checkpoint: path of the quantized checkpoint.
        backend: name of the backend.
        field: argument or config field that names the backend, for messages.

    Returns:
        The model, on the CPU, in eval mode.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if there is something that cannot be exported.
    """
    check_checkpoint(checkpoint, 'checkpoint')
    model = MODELS.build(config)
    if not isinstance(model, QuantModel):
        raise ValueError(f'model.type: got {config["type"]!r}, allowed: mmrazor.GeneralQuant')
    check_backend(model, backend, field)
    check_checkpoint_matches(load_checkpoint(model, checkpoint, map_location='cpu'), model)
    check_matched(model, 'checkpoint')
    if not model.is_calibrated:
        raise ValueError(
            f'checkpoint: {checkpoint} is not quantized; tools/test.py and tools/train.py write such files'
        )
    return model.eval()
