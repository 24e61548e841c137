"""The codebase ``mmrazor`` of mmdeploy: quantized models of the other codebases."""

from __future__ import annotations

from typing import Any

from mmdeploy.codebase.base import CODEBASE, MMCodebase, get_codebase_class
from mmdeploy.utils import Codebase, get_codebase, get_task_type
from mmengine.config import Config

from .task import QuantizedTask, float_config


@CODEBASE.register_module(Codebase.MMRAZOR.value)
class QuantizedCodebase(MMCodebase):
    """Gives mmdeploy the task processors of the codebase that the deploy config names, for quantized models."""

    @classmethod
    def register_all_modules(cls) -> None:
        """Does nothing: the codebase of the float model registers its modules when its task processor is built."""

    @classmethod
    def build_task_processor(cls, model_cfg: Config, deploy_cfg: Config, device: str) -> Any:
        """Builds the task processor.

        Args:
            model_cfg: config of the quantized model.
            deploy_cfg: deploy config; ``codebase_config.type`` is the codebase of the float model, such as ``mmdet``.
            device: name of the device.

        Returns:
            A task processor of that codebase that builds the quantized model.

        Raises:
            ValueError: a model that is not quantized here, or a deploy config that does not fit, naming the field.
        """
        float_config(model_cfg)
        codebase = get_codebase(deploy_cfg)
        if codebase is Codebase.MMRAZOR:
            raise ValueError(
                "codebase_config.type: got 'mmrazor', allowed: the codebase of the float model, such as 'mmdet'"
            )
        task = get_codebase_class(codebase).get_task_class(get_task_type(deploy_cfg))
        return type(f'Quantized{task.__name__}', (QuantizedTask, task), {})(model_cfg, deploy_cfg, device)
