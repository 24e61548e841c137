"""Models of both libraries with a backend's file as their network."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from mmengine.registry import DefaultScope
from small_detectors import predictions, runner_of, write_boxes

from mmrazor_quant.backends.deploy import deployed, head_of, open_session
from mmrazor_quant.engine.deployment import export

ROOT = Path(__file__).resolve().parents[2]
DIGITS = ROOT / 'configs' / 'quickstart' / 'ptq_w8a8.py'


@pytest.mark.parametrize('backend', ['onnxruntime', 'openvino'])
def test_tools_export_and_evaluate_a_classifier(backend, run_tool, tmp_path, capsys):
    work, out = tmp_path / 'work', tmp_path / 'deployed'
    options = ['--work-dir', work, '--cfg-options', f'model.quantizer.backend={backend}', 'model.float_checkpoint=None']
    assert run_tool('test', DIGITS, *options) is None
    checkpoint = work / 'quantized.pth'

    assert (
        run_tool('export', DIGITS, checkpoint, '--backend', backend, '--out', out, '--dynamic-batch', *options) is None
    )
    printed = capsys.readouterr().out
    assert 'same class: ' in printed and 'in integers: ' in printed and 'in float: ' in printed
    report = json.loads((out / 'deploy.json').read_text())
    assert report['backend'] == backend and report['checkpoint'] == str(checkpoint.resolve())
    assert report['agreement']['argmax'] >= 0.9
    bits = {name: tensor['bits'] for name, tensor in report['tensors'].items()}
    assert set(bits.values()) == {8} and 'backbone.conv1.weight' in bits

    metrics = tmp_path / 'metrics.json'
    assert run_tool('test', DIGITS, '--backend', backend, '--model', out, '--out', metrics, *options) is None
    found = json.loads(metrics.read_text())
    assert found['accuracy/top1'] == pytest.approx(found['quantized/accuracy/top1'], abs=2.0)
    assert 'float/accuracy/top1' in found
    assert 90 <= found['agreement'] <= 100


def test_tools_say_what_is_wrong(expect_error, run_tool, tmp_path):
    options = ['--work-dir', tmp_path / 'work', '--cfg-options', 'model.float_checkpoint=None']
    assert run_tool('test', DIGITS, *options) is None
    checkpoint = tmp_path / 'work' / 'quantized.pth'
    export_to = ('--out', tmp_path / 'out', *options)
    wrong = expect_error('export', DIGITS, checkpoint, '--backend', 'openvino', *export_to)
    assert "model.quantizer.backend: got 'onnxruntime', allowed with --backend openvino: 'openvino'" in wrong
    unknown = expect_error('export', DIGITS, checkpoint, '--backend', 'abacus', *export_to)
    assert "--backend: got 'abacus', allowed: onnxruntime, onnxruntime_dynamic, openvino" in unknown
    missing = expect_error('test', DIGITS, '--backend', 'onnxruntime', '--model', tmp_path / 'nothing', *options)
    assert 'there is no deploy.json in' in missing
    assert not (tmp_path / 'out').exists()
    (tmp_path / 'other').mkdir()
    (tmp_path / 'other' / 'deploy.json').write_text(json.dumps(dict(backend='openvino', checkpoint=str(checkpoint))))
    other = expect_error('test', DIGITS, '--backend', 'onnxruntime', '--model', tmp_path / 'other', *options)
    assert "--backend: got 'onnxruntime', allowed with --model" in other and "'openvino'" in other


def test_a_detector_keeps_its_own_post_processing(tmp_path):
    write_boxes(tmp_path)
    changes = {'model.quantizer.backend': 'onnxruntime'}
    with DefaultScope.overwrite_default_scope('mmdet'):
        runner = runner_of('retinanet', tmp_path, tmp_path / 'work', **changes)
        runner.test()
        model = runner.model
        images = torch.randn(2, 3, 64, 64)
        report = export(model, images, 'onnxruntime', tmp_path / 'out', (0,), 'quantized.pth')
        detector = deployed(model.architecture, open_session('onnxruntime', tmp_path / 'out'), images)
        found, expected = predictions(detector), predictions(model.architecture)

    assert report['agreement']['max_difference'] < 0.1
    # Of each of five levels the last two layers, whose results are the network's.
    assert report['layers']['float'] == {'Conv': 10} and report['layers']['integer']['QLinearConv'] > 60
    assert sum(len(values) for values in expected) > 0
    counts = [len(values) for values in found], [len(values) for values in expected]
    assert counts[0] == pytest.approx(counts[1], rel=0.2)


def test_models_without_one_head_are_refused():
    with pytest.raises(ValueError, match='got a Linear, allowed: classifiers of mmcls and one-stage detectors'):
        head_of(torch.nn.Linear(2, 2))
