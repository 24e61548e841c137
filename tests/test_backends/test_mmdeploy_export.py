"""Quantized detectors through mmdeploy's own API: ONNX with NMS inside, run in ONNX Runtime."""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from small_detectors import SIZE, write_boxes, write_config

from mmrazor_quant.algorithms import GeneralQuant
from mmrazor_quant.engine.launch import register_codebase

pytest.importorskip('mmdeploy', reason='mmdeploy is not installed; docs/deployment.md tells how')

DEPLOY = Path(__file__).resolve().parents[2] / 'configs' / 'deploy'
PLACED = """
_base_ = ['./quantized.py']
model = dict(architecture=dict(test_cfg=dict(score_thr={score_thr})), quantizer=dict(backend='onnxruntime'))
"""
SCORE_THR = dict(retinanet=0.9, yolox=0.2)
SIZED = "_base_ = ['{base}']\nonnx_config = dict(input_shape=({size}, {size}))\n"
FINAL_LAYERS = {
    'retinanet': dict(retina_cls=2.0, retina_reg=0.3),
    'yolox': dict(multi_level_conv_cls=4.0, multi_level_conv_reg=0.3, multi_level_conv_obj=2.0),
}


def quantize(name: str, root: Path) -> tuple[Path, Path]:
    """Quantize a small detector that finds something; returns its config and checkpoint."""
    register_codebase('mmdet')
    config = write_config(name, root, root / 'work', PLACED.replace('{score_thr}', str(SCORE_THR[name])))
    # Pixels, or what is left of them behind the normalization.
    images = torch.randn(2, 3, SIZE, SIZE) * (1 if name == 'retinanet' else 64)
    with DefaultScope.overwrite_default_scope('mmdet'), torch.no_grad():
        model = MODELS.build(Config.fromfile(config).model).eval()
        spread(model, images, FINAL_LAYERS[name])
        calibrate(model, lambda: model(images, mode='tensor'))
    torch.save(dict(state_dict=model.state_dict()), root / 'quantized.pth')
    return config, root / 'quantized.pth'


def calibrate(model: GeneralQuant, run: Callable[[], object]) -> None:
    """Calibrate a model on what ``run`` runs it on, and switch its quantizers on."""
    model.observe_weights()
    model.set_quant_state(act_observer=True)
    run()
    model.compute_act_qparams()
    model.set_quant_state(False, True, False, True)
    model.mark_calibrated()


def spread(model: torch.nn.Module, images: torch.Tensor, finals: dict[str, float]) -> None:
    """Draw weights that keep activations alive, and scale those of the final layers to results of some deviation."""
    for parameter in model.parameters():
        if parameter.dim() == 4:
            torch.nn.init.kaiming_normal_(parameter)
    for (path, deviation), results in zip(finals.items(), model(images, mode='tensor')):
        found = getattr(model.bbox_head, path)
        for layer, result in zip(found if isinstance(found, torch.nn.ModuleList) else [found], results):
            layer.weight *= deviation / result.std()


@pytest.mark.parametrize('name', ['retinanet', 'yolox'])
def test_tool_deploys_a_detector(name, tmp_path, run_tool, capsys):
    write_boxes(tmp_path)
    config, checkpoint = quantize(name, tmp_path)
    deploy = tmp_path / 'deploy.py'
    deploy.write_text(SIZED.format(base=DEPLOY / 'detection_onnxruntime_static-640x640.py', size=SIZE))
    out = tmp_path / 'out'
    capsys.readouterr()
    message = run_tool('deploy', deploy, config, checkpoint, tmp_path / 'images' / '0.png', '--work-dir', out)
    printed = capsys.readouterr().out
    assert message is None

    model = onnx.load(str(out / 'end2end.onnx'))
    onnx.checker.check_model(model, full_check=True)
    kinds = Counter(node.op_type for node in model.graph.node)
    assert {node.domain for node in model.graph.node} == {''}
    assert kinds['NonMaxSuppression'] == 1 and kinds['QuantizeLinear'] > 20
    assert [output.name for output in model.graph.output] == ['dets', 'labels']
    stored = [tensor for tensor in model.graph.initializer if tensor.data_type == onnx.TensorProto.INT8]
    assert sum(tensor.name.endswith('weight.0.integers') for tensor in stored) > 20
    assert 'QLinearConv' in printed and (out / 'output_onnxruntime.jpg').is_file()

    network, results = (line for line in printed.splitlines() if ' boxes of ' in line)
    expected, found, matched, difference, overlap = figures(network)
    assert expected == found == matched > 5 and max(expected, found) < 100, printed
    assert difference < 1e-3 and overlap > 0.99, printed
    expected, _, matched, difference, overlap = figures(results)
    # A box at the threshold may be on one side of it only. Of YOLOX, mmdeploy keeps more than the best class of a box.
    assert expected > 5 and matched >= 0.9 * expected, printed
    assert difference <= 0.02 and overlap > 0.9, printed


def figures(line: str) -> tuple[int, int, int, float, float]:
    """Read what is printed of a comparison: boxes on each side, pairs, difference of scores, overlap."""
    counts = re.search(r'(\d+) boxes .* (\d+) of .* (\d+) matched', line).groups()
    return *map(int, counts), *map(float, re.search(r'scores ([\d.]+), smallest overlap ([\d.]+)', line).groups())


def test_networks_of_few_bits_are_exported_as_they_compute():
    from mmrazor_quant.backends.mmdeploy.pairs import explicit_network

    images = torch.randn(2, 3, 16, 16)
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU(), torch.nn.Conv2d(8, 8, 3, groups=8),
        torch.nn.Flatten(), torch.nn.Linear(8 * 12 * 12, 5),
    )  # fmt: skip
    schemes = dict(w_qscheme=dict(bit=4, is_per_channel=False), a_qscheme=dict(bit=4, is_symmetry=True))
    quantizer = dict(type='mmrazor.CustomQuantizer', backend='onnxruntime', qconfig=schemes)
    model = GeneralQuant(network, quantizer, input_shape=(3, 16, 16)).eval()
    with torch.no_grad():
        calibrate(model, lambda: model(images))
        expected = model(images)
        explicit = explicit_network(model)
        torch.testing.assert_close(explicit(images), expected)
        file = io.BytesIO()
        torch.onnx.export(explicit, (images,), file, dynamo=False, opset_version=17, autograd_inlining=False)
    kinds = Counter(node.op_type for node in onnx.load_model_from_string(file.getvalue()).graph.node)
    assert kinds['Clip'] == kinds['QuantizeLinear'] > 2
    session = onnxruntime.InferenceSession(file.getvalue(), providers=['CPUExecutionProvider'])
    (found,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-3, atol=1e-3)


def test_what_does_not_fit_is_refused():
    from mmdeploy.apis import build_task_processor

    deploy = Config.fromfile(DEPLOY / 'detection_onnxruntime_dynamic.py')
    model = Config(dict(model=dict(type='mmrazor.GeneralQuant', architecture=dict(type='RetinaNet')), visualizer=None))
    for change, message in (
        (dict(onnx_config=dict(opset_version=11)), 'onnx_config.opset_version: got 11, allowed .*: 13 to 17'),
        (dict(backend_config=dict(type='ncnn')), "backend_config.type: got 'ncnn', allowed .*: 'onnxruntime'"),
        (dict(onnx_config=dict(type='torchscript')), "ir_config.type: got 'torchscript', allowed .*: 'onnx'"),
        (dict(codebase_config=dict(type='mmrazor')), "codebase_config.type: got 'mmrazor', allowed: the codebase"),
    ):
        changed = Config(deploy.to_dict())
        changed.merge_from_dict(change)
        with pytest.raises(ValueError, match=message):
            build_task_processor(model, changed, 'cpu')
    model.model.type = 'mmrazor.Other'
    with pytest.raises(ValueError, match="model.type: got 'mmrazor.Other', allowed: mmrazor.GeneralQuant"):
        build_task_processor(model, deploy, 'cpu')


def test_tool_names_what_is_missing(expect_error, tmp_path):
    deploy = DEPLOY / 'detection_onnxruntime_dynamic.py'
    message = expect_error('deploy', deploy, tmp_path / 'config.py', tmp_path / 'quantized.pth', tmp_path / '0.png')
    assert message.startswith(f'error: model_cfg: there is no file {tmp_path / "config.py"}')
