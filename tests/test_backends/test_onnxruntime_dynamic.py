"""Dynamic quantization in ONNX Runtime: files compute what the fake-quantized networks do, in integers."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from small_models import Net, calibrate, images, qconfig, quantized, trained
from torch import nn

from mmrazor_quant.backends.expected import integer_layers
from mmrazor_quant.backends.intermediate import export_intermediate, without_quantizers
from mmrazor_quant.backends.onnxruntime_dynamic import exporter
from mmrazor_quant.backends.onnxruntime_dynamic.runtime import Session, layers
from mmrazor_quant.backends.session import run

BACKEND, SHAPE = 'onnxruntime_dynamic', (3, 16, 16)
DYNAMIC = dict(type='mmrazor.DynamicFakeQuantize')


def forward(m, x):
    x = m.act(m.norm(m.conv(x)))
    x = m.act(m.depthwise(x) + x)
    tokens = m.tokens(x.flatten(2).transpose(1, 2))
    return m.linear(tokens.mean(1))


def network() -> nn.Module:
    found = dict(
        conv=nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False), norm=nn.BatchNorm2d(16), act=nn.ReLU(),
        depthwise=nn.Conv2d(16, 16, 3, padding=1, groups=16), tokens=nn.Linear(16, 24), linear=nn.Linear(24, 10),
    )  # fmt: skip
    return trained(Net(forward, **found))


def config(**fields):
    return qconfig(a_fake_quant=DYNAMIC, **fields)


def prepared(**fields):
    torch.manual_seed(0)
    return calibrate(quantized(network(), config(**fields), SHAPE, backend=BACKEND), images(4, SHAPE))


@pytest.mark.parametrize('fields', [{}, dict(w=4), dict(w_qscheme=dict(bit=8, is_per_channel=False))])
@torch.no_grad()
def test_a_file_computes_what_the_network_does(fields, tmp_path):
    model, x = prepared(**fields), images(4, SHAPE, 9)
    intermediate = export_intermediate(model, x, lambda net, x: net(x), (0,))
    file = exporter.write(intermediate, tmp_path)
    for batch in (x, 5 * x, x[:1] - 3):  # ranges that no calibration has seen
        (found,) = run(Session(file), batch)
        expected = model.architecture(batch)
        # The order of additions is another one, and a value next to a tie may be rounded the other way.
        assert (found - expected).abs().max() < 0.01 * expected.abs().max()
    assert layers(file).float == {} and sum(layers(file).integer.values()) == 4
    assert len(integer_layers(intermediate, model.quantizer.rules)) == 4

    proto = onnx.load(str(file))
    stored = [i for i in proto.graph.initializer if i.data_type == onnx.TensorProto.INT8 and i.dims]
    assert len(stored) == 4
    bit = fields.get('w', 8)
    assert max(np.abs(numpy_helper.to_array(i)).max() for i in stored) == 2 ** (bit - 1) - 1


@torch.no_grad()
def test_without_quantizers_it_computes_in_float():
    model, x = prepared(), images(2, SHAPE)
    intermediate = without_quantizers(export_intermediate(model, x, lambda net, x: net(x)))
    assert not any(node.domain for node in intermediate.onnx.graph.node)
    model.set_quant_state(False, True, False, False)
    expected = model.architecture(x)
    torch.testing.assert_close(intermediate.module(x)[0], expected, rtol=1e-4, atol=1e-5)
    model.set_quant_state(False, True, False, True)
    assert not torch.allclose(model.architecture(x), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_one_dimension(tmp_path):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv1d(3, 8, 3), nn.ReLU(), nn.Conv1d(8, 4, 3))
    x = torch.randn(2, 3, 20)
    model = calibrate(quantized(network, config(), (3, 20), backend=BACKEND), x)
    file = exporter.write(export_intermediate(model, x, lambda net, x: net(x)), tmp_path)
    found = torch.from_numpy(Session(file)(x.numpy())[0])
    torch.testing.assert_close(found, model.architecture(x), rtol=0, atol=0.01)


def test_what_cannot_be_run_is_refused():
    refused = [
        (dict(), BACKEND, 'type: got FakeQuantize'),
        (dict(a_fake_quant=dict(DYNAMIC, share='token')), BACKEND, r"share: got 'token', allowed .*: 'tensor'"),
        (dict(a_fake_quant=DYNAMIC), 'onnxruntime', 'type: got DynamicFakeQuantize, allowed .*: static ones'),
        (dict(a_fake_quant=DYNAMIC, a=6), BACKEND, r'a_qscheme\.bit: got 6'),
        (
            dict(a_fake_quant=DYNAMIC, a_qscheme=dict(bit=8, is_symmetry=False, is_pot_scale=True)),
            BACKEND,
            'is_pot_scale: got True',
        ),
    ]
    for fields, backend, message in refused:
        with pytest.raises(ValueError, match=message):
            quantized(network(), qconfig(**fields), SHAPE, backend=backend)


def test_transposed_convolutions_are_refused(tmp_path):
    layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 2, 2))
    model = calibrate(quantized(layers, config(), SHAPE, backend=BACKEND), images(2, SHAPE))
    intermediate = export_intermediate(model, images(2, SHAPE), lambda net, x: net(x))
    with pytest.raises(ValueError, match="ConvTranspose .* allowed in qconfig.overrides for the layer: w_qscheme='flo"):
        exporter.write(intermediate, tmp_path)
