"""Quantized detectors through mmdeploy's own API: ONNX with NMS inside, run in ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner import Runner
from small_detectors import write_boxes, write_config

from mmrazor_quant.engine.launch import register_codebase

pytest.importorskip('mmdeploy', reason='mmdeploy is not installed; docs/deployment.md tells how')

DEPLOY = Path(__file__).resolve().parents[2] / 'configs' / 'deploy'
PLACED = """
_base_ = ['./quantized.py']
model = dict(
    float_checkpoint='{root}/{name}.pth', architecture=dict(test_cfg=dict(score_thr=0.3)),
    quantizer=dict(backend='onnxruntime'),
)
"""
SIZED = "_base_ = ['{base}']\nonnx_config = dict(input_shape=(96, 64))\n"


@pytest.fixture
def images(tmp_path):
    write_boxes(tmp_path)
    return tmp_path


def quantize(name: str, root: Path) -> tuple[Path, Path]:
    """Quantize a small detector with scores all over the range; returns its config and checkpoint."""
    register_codebase('mmdet')
    config = write_config(name, root, root / 'work', PLACED.replace('{root}', str(root)).replace('{name}', name))
    with DefaultScope.overwrite_default_scope('mmdet'):
        model = MODELS.build(Config.fromfile(root / 'work' / 'float.py').model)
        model.init_weights()
        torch.manual_seed(0)
        for path, parameter in model.named_parameters():
            if path.endswith(('retina_cls.weight', 'conv_cls.0.weight', 'conv_obj.0.weight')):
                torch.nn.init.normal_(parameter, std=0.1)
            if path.endswith(('retina_cls.bias', 'conv_cls.0.bias', 'conv_obj.0.bias')):
                torch.nn.init.zeros_(parameter)
        torch.save(dict(state_dict=model.state_dict()), root / f'{name}.pth')
        cfg = Config.fromfile(config)
        cfg.merge_from_dict(dict(work_dir=str(root / 'work'), experiment_name=f'{name}_{root.name}', log_level='ERROR'))
        Runner.from_cfg(cfg).test()
    return config, root / 'work' / 'quantized.pth'


@pytest.mark.parametrize('name', ['retinanet', 'yolox'])
def test_tool_deploys_a_detector(name, images, run_tool, capsys):
    config, checkpoint = quantize(name, images)
    deploy = images / 'deploy.py'
    deploy.write_text(SIZED.format(base=DEPLOY / 'detection_onnxruntime_static-640x640.py'))
    capsys.readouterr()
    out = images / 'out'
    message = run_tool('deploy', deploy, config, checkpoint, images / 'images' / '0.png', '--work-dir', out)
    assert message is None
    printed = capsys.readouterr().out
    print(printed)
    assert 0
