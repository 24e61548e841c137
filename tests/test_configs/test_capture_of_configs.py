"""The smallest configs, built: captured whole, quantized where and with the bits that they say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from mmcls.utils import register_all_modules
from mmengine.config import Config
from mmengine.registry import DefaultScope

from mmrazor_quant.algorithms import GeneralQuant
from mmrazor_quant.registry import MODELS

ROOT = Path(__file__).resolve().parents[2] / 'configs'


def build(name: str) -> GeneralQuant:
    """Build the model of a config as the runner does, with random weights."""
    register_all_modules(init_default_scope=False)
    cfg = Config.fromfile(ROOT / name)
    for field in ('float_checkpoint', 'distillation'):
        cfg.model.pop(field, None)
    if 'data_preprocessor' in cfg:
        cfg.model.setdefault('data_preprocessor', cfg.data_preprocessor)
    with DefaultScope.overwrite_default_scope('mmcls'):
        return MODELS.build(cfg.model)


def bits(quantizer: torch.nn.Module) -> int:
    """Number of bits of a fake quantizer."""
    return (quantizer.quant_max - quantizer.quant_min).bit_length()


def calibrate(model: GeneralQuant, shape: tuple[int, ...]) -> torch.Tensor:
    """Calibrate on one random batch; returns the output for it."""
    images = torch.randn(shape)
    model.eval().observe_weights()
    with torch.no_grad():
        model.set_quant_state(act_observer=True)
        model(images)
        model.compute_act_qparams()
        model.set_quant_state(weight_fake_quant=True, act_observer=False, act_fake_quant=True)
        return model(images)


@pytest.mark.parametrize('name', ['ptq/benchmark/resnet20_w4a4_cifar10.py', 'qat/benchmark/resnet20_w4a4_cifar10.py'])
def test_resnet20_has_4_bits_but_for_first_and_last(name):
    model = build(name)

    weights = [bits(quantizer) for _, quantizer in model.weight_quantizers()]
    assert weights == [8] + [4] * 20 + [8]
    assert sorted(bits(quantizer) for _, quantizer in model.act_quantizers())[-2:] == [8, 8]
    assert all(row['layers'] for row in model.quantizable_report())
    assert calibrate(model, (2, 3, 32, 32)).isfinite().all()


@pytest.mark.parametrize('path', sorted(ROOT.glob('qat/benchmark/resnet20_*.py')), ids=lambda path: path.stem)
def test_resnet20_of_every_method_calibrates(path):
    model = build(str(path.relative_to(ROOT)))
    assert calibrate(model, (2, 3, 32, 32)).isfinite().all()


def quantized_layers(model: GeneralQuant) -> set[str]:
    """Paths of the layers whose weights are quantized."""
    return {path.rpartition('.')[0] for path, _ in model.weight_quantizers()}


def layers(model: GeneralQuant) -> set[str]:
    """Paths of all convolutions and linear layers."""
    kinds = (torch.nn.Conv2d, torch.nn.Linear)
    return {path for path, module in model.architecture.named_modules() if isinstance(module, kinds)}


def test_tinynet_of_the_examples():
    model = build('examples/tinynet_w8a8_cifar10.py')

    assert quantized_layers(model) == layers(model)
    assert len(layers(model)) == 1 + 6 * 2 + 1
    assert calibrate(model, (2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['ptq/mobilenet-v3-small_w8a8_in1k.py', 'qat/resnet18_w8a8_in1k.py'])
def test_stock_network_is_captured_whole(name):
    model = build(name)

    assert quantized_layers(model) == layers(model)
    assert calibrate(model, (2, 3, 64, 64)).isfinite().all()
