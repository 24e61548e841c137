"""Exported files hold the integers of training, and run as the fake-quantized network does."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from small_models import Net, calibrate, images, qconfig, quantized, trained
from torch import nn

from mmrazor_quant.backends.grid import QuantGrid
from mmrazor_quant.backends.intermediate import FakeQuantNode, export_intermediate
from mmrazor_quant.backends.onnxruntime import exporter
from mmrazor_quant.backends.onnxruntime.runtime import Session as OnnxSession
from mmrazor_quant.backends.onnxruntime.runtime import layers as onnx_layers
from mmrazor_quant.backends.openvino.runtime import Session as OpenVinoSession
from mmrazor_quant.backends.openvino.runtime import layers as openvino_layers
from mmrazor_quant.backends.qdq import as_uint8, to_qdq
from mmrazor_quant.backends.session import run

SHAPE = (3, 16, 16)


def residual(m, x):
    x = m.act(m.norm(m.conv(x)))
    x = m.act(m.norm2(m.conv2(x)) + m.shortcut(x))
    x = m.act(m.depthwise(x))
    return m.linear(x.mean((2, 3)))


def network() -> nn.Module:
    layers = {
        'conv': nn.Conv2d(3, 16, 3, bias=False), 'conv2': nn.Conv2d(16, 16, 3, padding=1, bias=False),
        'shortcut': nn.Conv2d(16, 16, 1), 'depthwise': nn.Conv2d(16, 16, 3, groups=16), 'linear': nn.Linear(16, 10),
    }  # fmt: skip
    norms = {'norm': nn.BatchNorm2d(16), 'norm2': nn.BatchNorm2d(16)}
    return trained(Net(residual, **layers, **norms, act=nn.ReLU()))


LEARNED = dict(type='mmrazor.LSQFakeQuantize')
ADAROUND = dict(type='mmrazor.AdaRoundFakeQuantize')
CONFIGS = {
    'asymmetric': qconfig(w=8, a=8),
    'symmetric': qconfig(w=8, a=8, a_qscheme=dict(bit=8, is_symmetry=True)),
    'symmetric range': qconfig(w=8, a=8, a_qscheme=dict(bit=8, is_symmetry=True, is_symmetric_range=True)),
    'signed': qconfig(w=8, a=8, a_qscheme=dict(bit=8, is_symmetry=False, is_signed=True)),
    'four bits': qconfig(w=4, a=4),
    'five and three bits': qconfig(w=5, a=3, a_qscheme=dict(bit=3, is_symmetry=True)),
    'per tensor': qconfig(w=8, a=8, w_qscheme=dict(bit=8, is_per_channel=False)),
    'power of two': qconfig(w=8, a=8, a_qscheme=dict(bit=8, is_symmetry=False, is_pot_scale=True)),
    'learned scales': qconfig(w=4, a=4, w_fake_quant=LEARNED, a_fake_quant=LEARNED),
    'learned rounding': qconfig(w=4, a=8, w_fake_quant=ADAROUND),
    'float first layer': qconfig(overrides=[dict(order='first', w_qscheme='float', a_qscheme='float')]),
}


def prepared(name: str, backend: str):
    torch.manual_seed(0)
    batches = [images(16, SHAPE, seed) for seed in range(4)]
    return calibrate(quantized(network(), CONFIGS[name], SHAPE, backend=backend), *batches)


def exported(model, dynamic=(0,)):
    return export_intermediate(model, images(2, SHAPE), lambda net, x: net(x), dynamic)


def steps_of_output(model) -> torch.Tensor:
    """Largest change of an output that one integer of the last layer's input makes."""
    linear = model.architecture.linear
    return (linear.weight.abs().amax(1) * linear.input_fake_quant.scale).max()


@pytest.mark.parametrize('backend', ['onnxruntime', 'openvino'])
@pytest.mark.parametrize('name', CONFIGS)
@torch.no_grad()
def test_a_file_computes_what_the_network_does(name, backend, tmp_path):
    model = prepared(name, backend)
    expected = model(images(32, SHAPE, 9))
    file = exporter.write(exported(model), tmp_path)
    session = (OnnxSession if backend == 'onnxruntime' else OpenVinoSession)(file)

    (found,) = run(session, images(32, SHAPE, 9))

    # Values next to a tie are rounded to either side: each change is one integer of a few inputs.
    difference = (found - expected).abs()
    assert difference.mean() < 0.02 * expected.abs().mean()
    assert difference.max() < 4 * steps_of_output(model)
    assert (found.argmax(1) == expected.argmax(1)).float().mean() > 0.9


@pytest.mark.parametrize('name', ['asymmetric', 'symmetric', 'four bits', 'learned scales'])
@torch.no_grad()
def test_without_optimization_the_file_is_exact(name, tmp_path):
    """Operation by operation nothing but the order of sums differs."""
    model = prepared(name, 'onnxruntime')
    file = exporter.write(exported(model), tmp_path)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(file), options, providers=['CPUExecutionProvider'])
    x = images(32, SHAPE, 9)

    found = torch.from_numpy(session.run(None, {'input': x.numpy()})[0])

    difference = (found - model(x)).abs() / model(x).abs().max()
    assert difference.median() < 1e-5


@pytest.mark.parametrize('name', ['asymmetric', 'symmetric', 'four bits'])
@torch.no_grad()
def test_all_convolutions_run_in_integers(name, tmp_path):
    found = {}
    for backend, count in (('onnxruntime', onnx_layers), ('openvino', openvino_layers)):
        (tmp_path / backend).mkdir()
        found[backend] = count(exporter.write(exported(prepared(name, backend)), tmp_path / backend))
    assert found['onnxruntime'].integer['QLinearConv'] == 4
    assert 'Conv' not in found['onnxruntime'].float and 'FusedConv' not in found['onnxruntime'].float
    assert sum(found['openvino'].integer.values()) == 5 and found['openvino'].float == {}


@pytest.mark.parametrize('name', ['asymmetric', 'four bits', 'learned rounding'])
@torch.no_grad()
def test_weights_are_stored_as_the_integers_of_training(name):
    model = prepared(name, 'onnxruntime')
    file = to_qdq(exported(model))
    stored = {i.name: numpy_helper.to_array(i) for i in file.graph.initializer}
    baked = model.bake()
    for site in model.inserted.weights:
        scale = model.architecture.get_submodule(site.quantizer).scale_in_use().numpy()
        values = baked.get_parameter(site.weight).numpy()
        integers = stored[f'network.{site.weight}.integers']
        assert integers.dtype == np.int8
        real = integers.astype(np.float32) * scale.reshape(-1, *[1] * (values.ndim - 1))
        np.testing.assert_allclose(real, values, rtol=1e-6, atol=1e-9)
    # In float there are biases and scales only.
    assert all(v.ndim < 2 for v in stored.values() if v.dtype == np.float32)


def test_no_custom_node_is_left():
    file = to_qdq(exported(prepared('asymmetric', 'onnxruntime')))
    assert {node.domain for node in file.graph.node} == {''} and [o.domain for o in file.opset_import] == ['']
    onnx.checker.check_model(file, full_check=True)


def test_the_model_stays_as_it_was():
    model = prepared('asymmetric', 'onnxruntime')
    before = {key: value.clone() for key, value in model.state_dict().items()}
    exported(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@torch.no_grad()
def test_batch_sizes(tmp_path):
    """A file of a fixed batch size is run in pieces; images of another size are refused."""
    model = prepared('asymmetric', 'onnxruntime')
    x = images(5, SHAPE)
    results = []
    for name, dynamic in (('fixed', ()), ('free', (0,))):
        (tmp_path / name).mkdir()
        results.append(run(OnnxSession(exporter.write(exported(model, dynamic), tmp_path / name)), x)[0])
    assert results[0].shape == (5, 10)
    torch.testing.assert_close(*results)
    with pytest.raises(ValueError, match=r'takes images of \(3, 16, 16\).*got \(3, 8, 8\)'):
        run(OnnxSession(tmp_path / 'free' / 'model.onnx'), images(2, (3, 8, 8)))


@torch.no_grad()
def test_any_size(tmp_path):
    model = prepared('asymmetric', 'onnxruntime')
    session = OnnxSession(exporter.write(exported(model, (0, 2, 3)), tmp_path))
    x = images(3, (3, 20, 24))
    (found,) = run(session, x)
    assert (found - model(x)).abs().mean() < 0.05 * model(x).abs().mean()


def branching(m, x):
    """Asks for sizes on the way, as transformers do."""
    if x.shape[2] != 16 or x.shape[-1] == 0:
        return m.linear(x.mean((2, 3)))
    return m.linear(m.act(m.conv(x)).mean((2, 3)))


def branching_model():
    layers = {'conv': nn.Conv2d(3, 16, 3), 'linear': nn.Linear(16, 10), 'act': nn.ReLU()}
    model = quantized(trained(Net(branching, **layers)), CONFIGS['asymmetric'], SHAPE, backend='onnxruntime')
    return calibrate(model, images(16, SHAPE))


@torch.no_grad()
def test_quantizers_of_a_forward_that_asks_for_sizes_are_in_the_file(tmp_path):
    model = branching_model()
    network = exported(model)

    names = [node.op_type for node in network.onnx.graph.node]
    assert names.count('FakeQuant') == len(network.activations) == 3
    (found,) = run(OnnxSession(exporter.write(network, tmp_path)), images(4, SHAPE))
    torch.testing.assert_close(found, model(images(4, SHAPE)), atol=0.05, rtol=0.05)


@torch.no_grad()
def test_quantizers_that_get_lost_are_named(monkeypatch):
    model = branching_model()
    forward = FakeQuantNode.forward

    def only_eager(node, x):
        return x if torch.jit.is_tracing() and node.grid.scale.size == 1 else forward(node, x)

    monkeypatch.setattr(FakeQuantNode, 'forward', only_eager)
    with pytest.raises(ValueError, match='quantizers that run in PyTorch did not.*network.conv'):
        exported(model)


def grid(low: int, high: int, zero_point: int) -> QuantGrid:
    return QuantGrid(np.array([0.5], np.float32), np.array([zero_point]), low, high, -1)


@pytest.mark.parametrize(
    'given, is_not_negative, expected',
    [
        ((0, 255, 7), False, (0, 255, 7)),
        ((-128, 127, 0), False, (0, 255, 128)),
        ((-128, 127, 0), True, (0, 127, 0)),
        ((-127, 127, 0), False, (0, 254, 127)),
        ((-128, 127, -128), True, (0, 255, 0)),
        ((0, 15, 0), True, (0, 15, 0)),
        ((-8, 7, 3), False, (0, 15, 11)),
        ((0, 15, 4), True, (0, 11, 0)),
    ],
)
def test_grids_in_unsigned_integers(given, is_not_negative, expected):
    assert as_uint8(grid(*given), is_not_negative) == expected


def test_more_than_eight_bits_are_refused():
    with pytest.raises(ValueError, match='more than 8 bits'):
        as_uint8(grid(0, 256, 0), False)
