"""The steps of mmdeploy's own ``tools/deploy.py``, and a comparison of the boxes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mmdeploy.apis import build_task_processor, torch2onnx
from mmdeploy.apis.utils import to_backend
from mmdeploy.core import RewriterContext, patch_model
from mmdeploy.utils import IR, get_backend, get_input_shape, get_ir_config, load_config
from mmengine.config import Config
from mmengine.structures import InstanceData
from torch import Tensor, nn

from mmrazor_quant.backends.simulation import arithmetic_of, simulated
from mmrazor_quant.engine.detections import BoxAgreement, compare_boxes


def deploy(deploy_cfg: str, model_cfg: str, checkpoint: str, image: str, work_dir: Path, device: str) -> list[str]:
    """Exports a quantized model with mmdeploy.

    Args:
        deploy_cfg: path of the deploy config.
        model_cfg: path of the config of the quantized model.
        checkpoint: path of the quantized checkpoint.
        image: path of an image to export with.
        work_dir: where to.
        device: name of the device.

    Returns:
        Paths of the files of the backend.
    """
    (config,) = load_config(deploy_cfg)
    file = get_ir_config(config)['save_file']
    torch2onnx(image, str(work_dir), file, deploy_cfg, model_cfg, checkpoint, device)
    backend = get_backend(config).value
    return to_backend(backend, [str(work_dir / file)], work_dir=str(work_dir), deploy_cfg=config, device=device)


@dataclass(frozen=True)
class Agreement:
    """How far the boxes of a deployed detector agree with those of the fake-quantized one in PyTorch.

    Args:
        network: with mmdeploy's post-processing on both sides: what the network and its file differ in.
        results: with mmdet's own post-processing in PyTorch: what a user sees.
    """

    network: BoxAgreement
    results: BoxAgreement

    def __str__(self) -> str:
        return (
            f"with mmdeploy's post-processing on both sides: {self.network}\n"
            f"with mmdet's own in PyTorch: {self.results}"
        )


@torch.no_grad()
def compare(
    deploy_cfg: str, model_cfg: str, checkpoint: str, image: str, files: list[str], work_dir: Path, device: str
) -> Agreement:
    """Compares the boxes of the deployed detector with those of the fake-quantized one, and draws both.

    The fake-quantized one computes in the arithmetic of the backend.

    Args:
        deploy_cfg: path of the deploy config.
        model_cfg: path of the config of the quantized model.
        checkpoint: path of the quantized checkpoint.
        image: path of an image.
        files: what :func:`deploy` returned.
        work_dir: where ``output_<backend>.jpg`` and ``output_pytorch.jpg`` are written to.
        device: name of the device.
    """
    config, model_config = load_config(deploy_cfg, model_cfg)
    task, backend = build_task_processor(model_config, config, device), get_backend(config).value
    quantized = simulated(task.build_quantized_model(checkpoint), arithmetic_of(backend))
    models = {'pytorch': quantized, backend: task.build_backend_model(files, task.update_data_preprocessor)}
    results = {}
    for name, model in models.items():
        data, _ = task.create_input(image, get_input_shape(config))
        (results[name],) = model.test_step(data)
        task.visualize(image, results[name], str(work_dir / f'output_{name}.jpg'), window_name=name)
    data, images = task.create_input(image, get_input_shape(config), data_preprocessor=quantized.data_preprocessor)
    outputs = models[backend].wrapper({config.onnx_config.input_names[0]: images})
    expected = _rewritten(quantized, config, images, data['data_samples'])
    found = [outputs[name] for name in config.onnx_config.output_names]
    return Agreement(
        compare_boxes(*(_boxes(*side) for side in (expected, found))),
        compare_boxes(*(result.pred_instances.cpu() for result in results.values())),
    )


def _rewritten(model: nn.Module, config: Config, images: Tensor, samples: Any) -> list[Tensor]:
    """Runs a detector as mmdeploy rewrites it for export: with its own decoding and NMS."""
    ir = get_ir_config(config)
    how = dict(cfg=config, backend=get_backend(config).value, ir=IR.get(ir['type']))
    with RewriterContext(**how, opset=ir['opset_version']):
        return patch_model(model, **how)(images, data_samples=samples, mode='predict')


def _boxes(detections: Tensor, labels: Tensor) -> InstanceData:
    """Returns what is in the outputs of the file for one image, without what fills them up."""
    detections, labels = detections[0].cpu(), labels[0].cpu()
    real = detections[:, 4] > 0
    return InstanceData(bboxes=detections[real, :4], scores=detections[real, 4], labels=labels[real])
