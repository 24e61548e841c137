"""Tools and models of both libraries with ncnn's files as their network."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from mmengine.registry import DefaultScope
from small_detectors import config_of, write_boxes

pytest.importorskip('ncnn', reason='the package ncnn is not installed')
pytest.importorskip('pnnx', reason='the package pnnx is not installed')

from mmrazor_quant.backends.deploy import raw_outputs
from mmrazor_quant.engine.deployment import export
from mmrazor_quant.engine.launch import register_codebase
from mmrazor_quant.registry import MODELS

DIGITS = Path(__file__).resolve().parents[2] / 'configs' / 'quickstart' / 'ptq_w8a8.py'
SCHEMES = {
    'model.quantizer.backend': 'ncnn',
    'model.quantizer.qconfig.w_qscheme.is_symmetric_range': True,
    'model.quantizer.qconfig.a_qscheme.is_symmetry': True,
    'model.quantizer.qconfig.a_qscheme.is_symmetric_range': True,
}


def test_tools_export_and_evaluate_a_classifier(run_tool, tmp_path, capsys):
    work, out, metrics = tmp_path / 'work', tmp_path / 'deployed', tmp_path / 'metrics.json'
    changes = [f'{key}={value}' for key, value in SCHEMES.items()]
    options = ['--work-dir', work, '--cfg-options', 'model.float_checkpoint=None', *changes]
    assert run_tool('test', DIGITS, *options) is None

    assert run_tool('export', DIGITS, work / 'quantized.pth', '--backend', 'ncnn', '--out', out, *options) is None
    printed = capsys.readouterr().out
    assert 'model.param: ' in printed and 'same class: ' in printed and 'in float: none' in printed
    report = json.loads((out / 'deploy.json').read_text())
    assert report['bytes'] == sum((out / name).stat().st_size for name in ('model.param', 'model.bin'))
    assert report['bytes'] < 0.4 * report['float_bytes'] and report['agreement']['argmax'] > 0.97
    assert {'ncnn', 'pnnx'} <= set(report['versions'])
    assert (out / 'model.table').is_file()

    assert run_tool('test', DIGITS, '--backend', 'ncnn', '--model', out, '--out', metrics, *options) is None
    found = json.loads(metrics.read_text())
    assert found['accuracy/top1'] == pytest.approx(found['quantized/accuracy/top1'], abs=1.0)


def test_a_detector_with_all_layers_in_integers(tmp_path):
    write_boxes(tmp_path)
    register_codebase('mmdet')
    with DefaultScope.overwrite_default_scope('mmdet'):
        model = MODELS.build(config_of('yolox', tmp_path, tmp_path / 'work', **SCHEMES).model).eval()
        images = torch.randn(2, 3, 64, 64)
        model.set_quant_state(False, False, True, False)
        model.observe_weights()
        raw_outputs(model.architecture, images)
        model.compute_act_qparams()
        model.mark_calibrated()
        report = export(model, images, 'ncnn', tmp_path / 'out', (), 'quantized.pth')

    assert report['agreement']['max_difference'] < 0.1
    assert report['layers']['float'] == {} and report['layers']['integer']['Convolution'] > 60
