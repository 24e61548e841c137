"""Networks exported to ncnn have the integers of training and compute what the fake-quantized ones do."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_models import Net, calibrate, images, qconfig, quantized, trained
from torch import nn

pytest.importorskip('ncnn', reason='the package ncnn is not installed')
pytest.importorskip('pnnx', reason='the package pnnx is not installed')

from mmrazor_quant.backends.intermediate import export_intermediate
from mmrazor_quant.backends.ncnn import exporter
from mmrazor_quant.backends.ncnn.layer_types import INT8_SCALE_TERM
from mmrazor_quant.backends.ncnn.param_file import read_param
from mmrazor_quant.backends.ncnn.runtime import Session, layers
from mmrazor_quant.backends.session import run

SHAPE = (3, 16, 16)
RANGE = dict(bit=8, is_symmetry=True, is_symmetric_range=True)


def config(w: int = 8, **fields):
    return qconfig(w=w, **{'a_qscheme': RANGE, **fields})


def residual(m, x):
    x = m.act(m.norm(m.conv(x)))
    x = m.act(m.norm2(m.conv2(x)) + m.shortcut(x))
    x = m.act(m.depthwise(x))
    return m.linear(x.mean((2, 3)))


def network() -> nn.Module:
    found = {
        'conv': nn.Conv2d(3, 16, 3, bias=False), 'conv2': nn.Conv2d(16, 16, 3, padding=1, bias=False),
        'shortcut': nn.Conv2d(16, 16, 1), 'depthwise': nn.Conv2d(16, 16, 3, groups=16), 'linear': nn.Linear(16, 10),
        'norm': nn.BatchNorm2d(16), 'norm2': nn.BatchNorm2d(16), 'act': nn.ReLU(),
    }  # fmt: skip
    return trained(Net(residual, **found))


def focus(m, x):
    """Picks every second pixel, as YOLOX's stem does, and calls one layer on inputs of two scales."""
    x = torch.cat([x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[:, :, 1::2, 1::2]], 1)
    x = F.silu(m.conv(x))
    x = torch.cat([m.shared(x), m.shared(3 * x)], 1)
    return m.up(F.max_pool2d(x, 5, 1, 2)), F.interpolate(x, scale_factor=2)


def focused() -> nn.Module:
    return Net(focus, conv=nn.Conv2d(12, 8, 3, padding=1), shared=nn.Conv2d(8, 8, 3, padding=1), up=nn.Conv2d(16, 4, 1))


def prepared(model: nn.Module, changes=None):
    batches = [images(16, SHAPE, seed) for seed in range(4)]
    return calibrate(quantized(model, changes or config(), SHAPE, backend='ncnn'), *batches)


def exported(model, folder, dynamic=()):
    return exporter.write(export_intermediate(model, images(2, SHAPE), lambda net, x: net(x), dynamic), folder)


def assert_same(found, expected):
    """A value next to a tie that is rounded to the other side moves a few outputs by a step; the others are equal."""
    difference = (found - expected).abs() / expected.abs().max()
    assert found.shape == expected.shape
    assert difference.median() < 1e-5 and difference.mean() < 2e-3 and difference.max() < 0.05


LEARNED = dict(type='mmrazor.LSQFakeQuantize')
FLOAT = dict(w_qscheme='float', a_qscheme='float')
CONFIGS = {
    'eight bits': config(),
    'four bits': config(w=4),
    'per tensor': config(w_qscheme=RANGE),
    'power of two': config(a_qscheme=dict(RANGE, is_pot_scale=True)),
    'learned scales': config(w_fake_quant=LEARNED, a_fake_quant=LEARNED),
    'learned rounding': config(w=4, w_fake_quant=dict(type='mmrazor.AdaRoundFakeQuantize')),
    'float first layer': config(overrides=[dict(order='first', **FLOAT)]),
}


@pytest.mark.parametrize('name', CONFIGS)
@torch.no_grad()
def test_files_compute_what_the_network_does(name, tmp_path):
    model = prepared(network(), CONFIGS[name])
    x = images(32, SHAPE, 9)
    file = exported(model, tmp_path)

    assert_same(run(Session(file), x)[0], model(x))
    convolutions = 2 if name == 'float first layer' else 3
    assert layers(file).integer == {'Convolution': convolutions, 'ConvolutionDepthWise': 1, 'InnerProduct': 1}
    assert layers(file).float == ({'Convolution': 1} if name == 'float first layer' else {})


@torch.no_grad()
def test_pixels_picked_with_gaps_and_layers_called_twice(tmp_path):
    model = prepared(focused())
    x = images(4, SHAPE, 9)
    file = exported(model, tmp_path)
    for found, expected in zip(run(Session(file), x), model(x), strict=True):
        assert_same(found, expected)
    assert layers(file).integer == {'Convolution': 4} and layers(file).float == {}
    scales = [line.split()[1] for line in (tmp_path / 'model.table').read_text().splitlines()[4:]]
    assert len(set(scales)) == 4


@torch.no_grad()
def test_integers_and_scales_are_those_of_training(tmp_path):
    model = prepared(network(), config(w=5))
    file = exported(model, tmp_path)
    content = (tmp_path / 'model.bin').read_bytes()
    baked = model.bake()
    for site in model.inserted.weights:
        scale = model.architecture.get_submodule(site.quantizer).scale_in_use()
        values = baked.get_parameter(site.weight)
        integers = (values / scale.reshape(-1, *[1] * (values.dim() - 1))).round()
        assert integers.abs().max() <= 15
        assert integers.numpy().astype(np.int8).tobytes() in content
        assert (1 / scale).numpy().tobytes() in content
    inputs = [1 / model.architecture.get_submodule(path).scale for path in model.inserted.activations]
    table = [float(line.split()[1]) for line in (tmp_path / 'model.table').read_text().splitlines()[5:]]
    # Two layers share the quantizer of one tensor.
    assert sorted(set(np.float32(table))) == sorted(np.float32(value) for value in inputs)
    assert [layer.params[INT8_SCALE_TERM] for layer in read_param(file) if INT8_SCALE_TERM in layer.params]


@torch.no_grad()
def test_the_model_stays_as_it_was(tmp_path):
    model = prepared(focused())
    x = images(2, SHAPE, 9)
    before, outputs = {key: value.clone() for key, value in model.state_dict().items()}, model(x)
    exported(model, tmp_path)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(map(torch.equal, model(x), outputs))


@torch.no_grad()
def test_sizes(tmp_path):
    """One image is run at a time; sizes are fixed, or free on demand."""
    model = prepared(focused())
    results = []
    for name, dynamic in (('fixed', (0,)), ('free', (2, 3))):
        (tmp_path / name).mkdir()
        results.append(Session(exported(model, tmp_path / name, dynamic), threads=2))
    assert [session.shape for session in results] == [(1, 3, 16, 16), (1, 3, None, None)]
    # In the memory of another order, too.
    x = images(3, (24, 32, 3), 9).permute(0, 3, 1, 2)
    for found, expected in zip(run(results[1], x), model(x), strict=True):
        assert_same(found, expected)
    with pytest.raises(ValueError, match=r'takes images of \(3, 16, 16\).*got \(3, 24, 32\)'):
        run(results[0], x)


def one_layer(layer: nn.Module) -> nn.Module:
    return Net(lambda m, x: m.last(F.relu(m.layer(x))), layer=layer, last=nn.Conv2d(6, 4, 1))


REFUSED = {
    'transposed': (nn.ConvTranspose2d(3, 6, 2), {}, r'layer.input_fake_quant: quantizes the input of a Deconvolution'),
    'in one dimension': (
        nn.Sequential(nn.Flatten(2), nn.Conv1d(3, 6, 3), nn.Unflatten(2, (2, 127))),
        {},
        r'layer.1.input_fake_quant: quantizes the input of a Convolution1D',
    ),
    'weight is float': (nn.Conv2d(3, 6, 3), dict(w_qscheme='float'), r'layer.input_fake_quant: .* is not quantized'),
}


@pytest.mark.parametrize('name', REFUSED)
def test_layers_that_ncnn_does_not_run_in_integers_are_named(name, tmp_path):
    layer, changes, message = REFUSED[name]
    model = prepared(one_layer(layer), config(overrides=[dict(name='layer', **changes)] if changes else []))
    with pytest.raises(ValueError, match=message):
        exported(model, tmp_path)


@torch.no_grad()
def test_a_layer_of_quantized_weight_alone_is_float(tmp_path):
    model = prepared(one_layer(nn.Conv2d(3, 6, 3)), config(overrides=[dict(name='layer', a_qscheme='float')]))
    x = images(4, SHAPE, 9)
    file = exported(model, tmp_path)
    assert_same(run(Session(file), x)[0], model(x))
    assert (layers(file).integer, layers(file).float) == ({'Convolution': 1}, {'Convolution': 1})


def grouped() -> nn.Module:
    return Net(lambda m, x: m.groups(F.relu(m.conv(x))), conv=nn.Conv2d(3, 8, 3), groups=nn.Conv2d(8, 8, 3, groups=2))


@torch.no_grad()
def test_groups_of_channels_need_one_scale_each(tmp_path):
    with pytest.raises(ValueError, match=r'groups.weight: a convolution of 2 groups with 8 output channels'):
        exported(prepared(grouped()), tmp_path)
    one = dict(name='groups', w_qscheme=dict(is_per_channel=False))
    model = prepared(grouped(), config(overrides=[one]))
    x = images(4, SHAPE, 9)
    assert_same(run(Session(exported(model, tmp_path)), x)[0], model(x))


BACKEND_REFUSES = {
    'a_qscheme.bit': (dict(bit=4), "qconfig.a_qscheme.bit: got 4, allowed with quantizer.backend='ncnn': 8"),
    'w_qscheme.bit': (dict(bit=9), "qconfig.w_qscheme.bit: got 9, allowed with quantizer.backend='ncnn': 1 to 8"),
    'a_qscheme.is_symmetry': (dict(is_symmetry=False, is_signed=True), 'a_qscheme.is_symmetry: got False, allowed'),
    'a_qscheme.is_per_channel': (dict(is_per_channel=True), 'a_qscheme.is_per_channel: got True, allowed'),
    'a_qscheme.is_symmetric_range': (
        dict(is_symmetric_range=False),
        "qconfig.a_qscheme.is_symmetric_range: got False, allowed with quantizer.backend='ncnn': True",
    ),
    'w_qscheme.is_symmetric_range': (dict(is_symmetric_range=False), 'w_qscheme.is_symmetric_range: got False'),
}


@pytest.mark.parametrize('field', BACKEND_REFUSES)
def test_schemes_that_ncnn_does_not_have_are_refused(field):
    changes, message = BACKEND_REFUSES[field]
    name = field.partition('.')[0]
    with pytest.raises(ValueError) as error:
        quantized(network(), config(**{name: dict(RANGE, **changes)}), backend='ncnn')
    assert message in str(error.value)


def test_damaged_files_are_refused(tmp_path):
    file = exported(prepared(network()), tmp_path)
    (tmp_path / 'model.bin').write_bytes(b'')
    with pytest.raises(ValueError, match='ncnn cannot read .*model.param with model.bin'):
        Session(file)
