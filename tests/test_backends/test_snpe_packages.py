"""What Qualcomm's packages make of the files: AIMET of the encodings, QNN's simulator of the Q/DQ network.

Neither is in the environment of this project; docs/deployment.md says how to run these tests.
"""

from __future__ import annotations

import os
from pathlib import Path

import onnx
import pytest
import torch
from mmcls.utils import register_all_modules
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmengine.runner import Runner
from small_models import images
from test_snpe import SHAPE, exported, prepared
from torch import Tensor

from mmrazor_quant.backends.deploy import raw_outputs
from mmrazor_quant.backends.session import run
from mmrazor_quant.backends.snpe import exporter
from mmrazor_quant.backends.snpe.encodings import VERSIONS
from mmrazor_quant.backends.snpe.runtime import Session, Simulator
from mmrazor_quant.engine.calibration import set_quantized
from mmrazor_quant.engine.deployment import export

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / 'configs' / 'ptq' / 'benchmark' / 'resnet20_w8a8_snpe_cifar10.py'
IMAGES = 200


@pytest.fixture(scope='module')
def resnet20(tmp_path_factory) -> tuple[Path, Tensor, Tensor]:
    """Folder of an exported ResNet-20, test images, and what the fake-quantized network says of them."""
    data = Path(os.environ.get('MMRAZOR_QUANT_DATA') or ROOT.parent / 'shared' / 'data')
    if not (data / 'cifar10_jpeg').is_dir():
        pytest.skip(f'no data in {data}; the environment variable MMRAZOR_QUANT_DATA names their folder')
    register_all_modules(init_default_scope=False)
    cfg = Config.fromfile(CONFIG)
    cfg.work_dir = str(tmp_path_factory.mktemp('work'))
    cfg.test_cfg.calibrate_steps = 4
    cfg.train_dataloader.num_workers = cfg.test_dataloader.num_workers = 0
    cfg.test_dataloader.dataset.indices = list(range(0, 10_000, 10_000 // IMAGES))
    runner = Runner.from_cfg(cfg)
    runner.test()
    with DefaultScope.overwrite_default_scope('mmcls'), torch.no_grad():
        model = runner.model.eval()
        x = torch.cat([model.data_preprocessor(batch, False)['inputs'] for batch in runner.test_dataloader])
        folder = tmp_path_factory.mktemp('deployed')
        export(model, x[:10], 'snpe', folder, (), 'quantized.pth')
        set_quantized(model)
        return folder, x, raw_outputs(model.architecture, x)


def same_class(found: Tensor, expected: Tensor) -> float:
    """Share of images."""
    return (found.argmax(1) == expected.argmax(1)).float().mean().item()


def aimet(folder: Path, version: str):
    """A function that runs the float file with encodings in AIMET, and the number of quantizers with one."""
    quantsim = pytest.importorskip('aimet_onnx.quantsim')
    model = onnx.load(str(folder / 'model.onnx'))
    batch = model.graph.input[0].type.tensor_type.shape.dim[0].dim_value
    sim = quantsim.QuantizationSimModel(model, param_type='int8', activation_type='int8', config_file='default')
    quantsim.load_encodings_to_sim(sim, str(folder / f'encodings_{version}.json'), strict=False)

    def call(x: Tensor) -> Tensor:
        pieces = [sim.session.run(None, {'input': piece.numpy()})[0] for piece in x.split(batch)]
        return torch.cat([*map(torch.from_numpy, pieces)])

    return call, sum(quantizer.enabled for quantizer in sim.qc_quantize_op_dict.values())


@pytest.mark.parametrize('version', VERSIONS)
@pytest.mark.parametrize('name', ['asymmetric', 'symmetric', '4-bit weights', '6-bit weights'])
@torch.no_grad()
def test_aimet_computes_with_the_encodings_what_the_network_does(name, version, tmp_path):
    pytest.importorskip('aimet_onnx', reason='aimet-onnx is not installed')
    model = prepared(name)
    exporter.write(exported(model), tmp_path)
    x = images(32, SHAPE, 9)
    expected = model(x)

    call, _ = aimet(tmp_path, version)

    difference = (call(x) - expected).abs() / expected.abs().max()
    assert difference.median() < 2e-3 and difference.max() < 0.1


@pytest.mark.slow
@pytest.mark.parametrize('version', VERSIONS)
def test_aimet_agrees_on_resnet20(version, request):
    pytest.importorskip('aimet_onnx', reason='aimet-onnx is not installed')
    folder, x, expected = request.getfixturevalue('resnet20')
    call, count = aimet(folder, version)
    found = same_class(call(x), expected)
    print(f'AIMET, encodings {version}: {100 * found:.1f} % of {len(x)} images, {count} quantizers')
    assert found >= 0.99 and count >= 50


@pytest.mark.parametrize('name', ['asymmetric', 'symmetric', 'signed', '4-bit weights'])
@torch.no_grad()
def test_all_of_a_network_runs_on_the_simulator(name, tmp_path):
    pytest.importorskip('onnxruntime_qnn', reason='onnxruntime-qnn is not installed')
    model = prepared(name)
    file = exporter.write(exported(model), tmp_path)
    assert Session(file).stand_in is None
    x = images(32, SHAPE, 9)
    expected = model(x)

    (found,) = run(Simulator(file, only=True), x)

    difference = (found - expected).abs() / expected.abs().max()
    assert difference.median() < 0.02 and difference.max() < 0.2


@pytest.mark.slow
def test_the_simulator_agrees_on_resnet20(request):
    pytest.importorskip('onnxruntime_qnn', reason='onnxruntime-qnn is not installed')
    folder, x, expected = request.getfixturevalue('resnet20')
    found = same_class(run(Simulator(folder / exporter.FILE, only=True), x)[0], expected)
    print(f"QNN's simulator: {100 * found:.1f} % of {len(x)} images")
    assert found >= 0.98
