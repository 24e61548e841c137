"""The tools with backends that are not on this machine: what stands in for them is said wherever a number is."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DIGITS = ROOT / 'configs' / 'quickstart' / 'ptq_w8a8.py'
PACKAGES = {'tensorrt': 'tensorrt', 'snpe': 'onnxruntime_qnn'}
SCHEMES = {'tensorrt': ['model.quantizer.qconfig.a_qscheme.is_symmetry=True'], 'snpe': []}
FILES = {
    'tensorrt': {'deploy.json', 'model.onnx'},
    'snpe': {
        'deploy.json', 'model.onnx', 'model_qdq.onnx', 'encodings_0.6.1.json', 'encodings_1.0.0.json',
        'encodings_2.0.0.json',
    },
}  # fmt: skip


@pytest.mark.parametrize('backend', PACKAGES)
def test_tools_export_and_evaluate(backend, run_tool, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, PACKAGES[backend], None)
    work, out, metrics = tmp_path / 'work', tmp_path / 'deployed', tmp_path / 'metrics.json'
    changes = [f'model.quantizer.backend={backend}', 'model.float_checkpoint=None', *SCHEMES[backend]]
    options = ['--work-dir', work, '--cfg-options', *changes]
    assert run_tool('test', DIGITS, *options) is None
    checkpoint = work / 'quantized.pth'

    assert run_tool('export', DIGITS, checkpoint, '--backend', backend, '--out', out, *options) is None
    printed = capsys.readouterr().out
    assert f'not run by {backend}: ' in printed and 'ONNX Runtime on CPU, without graph optimizations' in printed
    assert ('trtexec --onnx=' if backend == 'tensorrt' else '--quantization_overrides ') in printed
    report = json.loads((out / 'deploy.json').read_text())
    assert report['stand_in'] in printed and report['agreement']['argmax'] >= 0.9
    assert report['layers']['float'] == {} and {path.name for path in out.iterdir()} == FILES[backend]

    assert run_tool('test', DIGITS, '--backend', backend, '--model', out, '--out', metrics, *options) is None
    shown = capsys.readouterr()
    assert f'{backend} (stand-in)' in shown.out + shown.err and f'Not run by {backend}: ' in shown.out + shown.err
    found = json.loads(metrics.read_text())
    assert found['accuracy/top1'] == pytest.approx(found['quantized/accuracy/top1'], abs=2.0)
