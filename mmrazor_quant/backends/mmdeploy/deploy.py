"""The steps of mmdeploy's own ``tools/deploy.py``, and a comparison of the boxes."""

from __future__ import annotations

from pathlib import Path

import torch
from mmdeploy.apis import build_task_processor, torch2onnx
from mmdeploy.apis.utils import to_backend
from mmdeploy.utils import get_backend, get_input_shape, get_ir_config, load_config

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


@torch.no_grad()
def compare(
    deploy_cfg: str, model_cfg: str, checkpoint: str, image: str, files: list[str], work_dir: Path, device: str
) -> BoxAgreement:
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
    models = {
        'pytorch': simulated(task.build_quantized_model(checkpoint), arithmetic_of(backend)),
        backend: task.build_backend_model(files, task.update_data_preprocessor),
    }
    results = {}
    for name, model in models.items():
        data, _ = task.create_input(image, get_input_shape(config))
        (results[name],) = model.test_step(data)
        task.visualize(image, results[name], str(work_dir / f'output_{name}.jpg'), window_name=name)
    return compare_boxes(*(result.pred_instances.cpu() for result in results.values()))
