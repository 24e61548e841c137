"""What is different in mmdeploy's task processors where the model is quantized: how it is built."""

from __future__ import annotations

import copy
from typing import Any

import torch
from mmdeploy.utils import get_backend, get_ir_config
from mmengine.config import Config
from torch import nn

from mmrazor_quant.backends.loading import load_quantized

from .pairs import explicit_network

BACKENDS = ('onnxruntime',)
"""Backends of mmdeploy that take uint8 activations and int8 weights in Q/DQ pairs."""

OPSETS = range(13, 18)
"""Scales per channel came with 13; from 18 on, what mmdeploy writes for layer norms is no ONNX."""

GENERAL_QUANT = ('GeneralQuant', 'mmrazor.GeneralQuant')


class QuantizedTask:
    """Mixed into a task processor of mmdeploy, builds the quantized model; all the rest sees the float model's config.

    Args:
        model_cfg: config of the quantized model.
        deploy_cfg: deploy config.
        device: name of the device.

    Raises:
        ValueError: a field of the deploy config that does not fit a quantized model.
    """

    def __init__(self, model_cfg: Config, deploy_cfg: Config, device: str) -> None:
        check_deploy_config(deploy_cfg)
        self.quantized_cfg = model_cfg
        super().__init__(float_config(model_cfg), deploy_cfg, device)

    def build_quantized_model(self, model_checkpoint: str) -> nn.Module:
        """Builds the fake-quantized model.

        Args:
            model_checkpoint: path of the quantized checkpoint.

        Returns:
            The :class:`mmrazor_quant.algorithms.GeneralQuant`, in eval mode, everything quantized.

        Raises:
            ValueError: a checkpoint that is missing, not quantized or of another model, or a model whose quantizers
                were placed for another backend.
        """
        if model_checkpoint is None:
            raise ValueError('checkpoint: got None, allowed for a quantized model: a quantized checkpoint')
        config = copy.deepcopy(self.quantized_cfg.model)
        if self.quantized_cfg.get('data_preprocessor') is not None:
            config.setdefault('data_preprocessor', self.quantized_cfg.data_preprocessor)
        model = load_quantized(config, model_checkpoint, get_backend(self.deploy_cfg).value, 'backend_config.type')
        model.set_quant_state(False, True, False, True)
        return model.to(self.device)

    def build_pytorch_model(self, model_checkpoint: str, *args: Any, **kwargs: Any) -> nn.Module:
        """Builds the model that mmdeploy exports: the architecture, with all that is quantized said explicitly.

        Args:
            model_checkpoint: path of the quantized checkpoint.
            *args: not used.
            **kwargs: not used.

        Returns:
            The architecture.
        """
        with torch.no_grad():
            return explicit_network(self.build_quantized_model(model_checkpoint)).to(self.device)


def float_config(model_cfg: Config) -> Config:
    """Returns the config of the float model that a config quantizes.

    Args:
        model_cfg: config of the quantized model.

    Raises:
        ValueError: if the model is no :class:`mmrazor_quant.algorithms.GeneralQuant`.
    """
    if model_cfg.model.type not in GENERAL_QUANT:
        raise ValueError(f'model.type: got {model_cfg.model.type!r}, allowed: mmrazor.GeneralQuant')
    cfg = copy.deepcopy(model_cfg)
    quantized = cfg.model
    cfg.model = quantized.architecture
    for preprocessor in (quantized.get('data_preprocessor'), cfg.get('data_preprocessor')):
        if preprocessor is not None:
            cfg.model.setdefault('data_preprocessor', preprocessor)
    return cfg


def check_deploy_config(deploy_cfg: Config) -> None:
    """Refuses what a quantized model cannot be exported with.

    Args:
        deploy_cfg: deploy config.

    Raises:
        ValueError: naming the field, what it is, and what is allowed.
    """
    backend = get_backend(deploy_cfg).value
    if backend not in BACKENDS:
        raise ValueError(
            f'backend_config.type: got {backend!r}, allowed for a quantized model: {", ".join(map(repr, BACKENDS))}'
        )
    ir = get_ir_config(deploy_cfg)
    kind, opset = ir.get('type', 'onnx'), ir.get('opset_version', 11)
    if kind != 'onnx':
        raise ValueError(f"ir_config.type: got {kind!r}, allowed for a quantized model: 'onnx'")
    if opset not in OPSETS:
        raise ValueError(
            f'onnx_config.opset_version: got {opset}, allowed for a quantized model: {OPSETS[0]} to {OPSETS[-1]}'
        )
