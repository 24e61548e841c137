"""Files for TensorRT: explicit quantization by its rules, with the integers of training."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper
from small_models import Net, calibrate, images, names, qconfig, quantized, trained
from torch import nn

from mmrazor_quant.backends.intermediate import export_intermediate
from mmrazor_quant.backends.qdq_graph import DQ, Q, QdqGraph
from mmrazor_quant.backends.session import run
from mmrazor_quant.backends.tensorrt import exporter
from mmrazor_quant.backends.tensorrt.lint import lint
from mmrazor_quant.backends.tensorrt.runtime import Engine, Session, layers

SHAPE = (3, 16, 16)
SYMMETRIC = dict(bit=8, is_symmetry=True)


def residual(m, x):
    x = m.act(m.norm(m.conv(x)))
    x = m.act(m.norm2(m.conv2(x)) + m.shortcut(x))
    x = m.act(m.deconv(m.depthwise(x)))
    return m.linear(x.mean((2, 3)))


def network() -> nn.Module:
    layers = {
        'conv': nn.Conv2d(3, 16, 3, bias=False), 'conv2': nn.Conv2d(16, 16, 3, padding=1, bias=False),
        'shortcut': nn.Conv2d(16, 16, 1), 'depthwise': nn.Conv2d(16, 16, 3, groups=16),
        'deconv': nn.ConvTranspose2d(16, 12, 2, 2), 'linear': nn.Linear(12, 10),
    }  # fmt: skip
    norms = {'norm': nn.BatchNorm2d(16), 'norm2': nn.BatchNorm2d(16)}
    return trained(Net(residual, **layers, **norms, act=nn.ReLU()))


def attention(m, x):
    x = m.patches(x).flatten(2).transpose(1, 2)
    weights = (m.query(x) @ m.key(x).transpose(1, 2)).softmax(-1)
    return m.linear((x + weights @ m.value(x)).mean(1))


def tokens() -> nn.Module:
    layers = {name: nn.Linear(16, 16) for name in ('query', 'key', 'value')}
    return Net(attention, patches=nn.Conv2d(3, 16, 4, 4), **layers, linear=nn.Linear(16, 10))


LEARNED = dict(type='mmrazor.LSQFakeQuantize')
NETWORKS = {
    '8 bits': (network, dict(w=8)),
    '4-bit weights': (network, dict(w=4)),
    'weights per tensor': (network, dict(w_qscheme=dict(bit=8))),
    'power of two': (network, dict(a_qscheme=dict(SYMMETRIC, is_pot_scale=True))),
    'learned scales': (network, dict(w=4, w_fake_quant=LEARNED, a_fake_quant=LEARNED)),
    'integer biases': (network, dict(quantize_bias=True)),
    'float first layer': (network, dict(overrides=[dict(order='first', w_qscheme='float', a_qscheme='float')])),
    'attention': (tokens, dict(w=8)),
}


def prepared(name: str):
    torch.manual_seed(0)
    make, fields = NETWORKS[name]
    fields = dict(fields)
    bias = fields.pop('quantize_bias', False)
    config = qconfig(**{'a_qscheme': SYMMETRIC, **fields})
    model = quantized(make(), config, SHAPE, backend='tensorrt', quantize_bias=bias)
    return calibrate(model, *[images(16, SHAPE, seed) for seed in range(4)])


def exported(model, dynamic=(0,)):
    return export_intermediate(model, images(2, SHAPE), lambda net, x: net(x), dynamic)


@pytest.mark.parametrize('name', NETWORKS)
@torch.no_grad()
def test_a_file_obeys_the_rules_and_computes_what_the_network_does(name, tmp_path):
    model = prepared(name)
    x = images(32, SHAPE, 9)
    expected = model(x)

    file = exporter.write(exported(model), tmp_path)
    (found,) = run(Session(file), x)

    assert lint(onnx.load(str(file))) == []
    difference = (found - expected).abs() / expected.abs().max()
    # Values next to a tie are rounded to either side.
    assert difference.median() < 2e-3 and difference.max() < 0.05
    assert (found.argmax(1) == expected.argmax(1)).float().mean() > 0.9


@pytest.mark.parametrize('name', ['8 bits', '4-bit weights', 'learned scales', 'attention'])
@torch.no_grad()
def test_weights_are_float_and_quantize_to_the_integers_of_training(name, tmp_path):
    model = prepared(name)
    intermediate = exported(model)
    graph = QdqGraph(onnx.load(str(exporter.write(intermediate, tmp_path))))
    before = {i.name: numpy_helper.to_array(i) for i in intermediate.onnx.graph.initializer}
    found = 0
    for pair in graph.nodes(Q):
        weight = graph.weight(pair)
        if weight is None:
            continue
        found += 1
        assert weight.data_type == TensorProto.FLOAT
        name = weight.name.removesuffix('.float')
        grid, values = intermediate.weights[name], numpy_helper.to_array(weight)
        scale, _ = graph.scale_and_zero_point(pair)
        axis = next((a.i for a in pair.attribute if a.name == 'axis'), None)
        shape = [-1 if d == axis else 1 for d in range(values.ndim)]
        # As QuantizeLinear does: divided, and rounded to the nearest even one.
        integers = np.rint(values / scale.reshape(shape))
        expected = grid.integers(before[name])
        if integers.shape != expected.shape or not np.array_equal(integers, expected):
            expected = expected.T  # stored as the matrix product reads it
        assert np.array_equal(integers, expected)
        assert np.abs(integers).max() <= max(-grid.quant_min, grid.quant_max)
    assert found == len(intermediate.weights)


def test_linear_layers_on_tokens_are_stored_as_they_are_read(tmp_path):
    graph = QdqGraph(onnx.load(str(exporter.write(exported(prepared('attention')), tmp_path))))
    weights = [graph.made_by(node.input[1], DQ) for node in graph.nodes('MatMul')]
    axes = [next(a.i for a in pair.attribute if a.name == 'axis') for pair in weights if graph.weight(pair) is not None]
    assert axes == [1, 1, 1]


def test_inputs_are_quantized_and_results_are_not():
    found = names(prepared('8 bits').act_quantizers())
    assert sorted(found) == [
        'add_input0_fake_quant', 'conv.input_fake_quant', 'conv2.input_fake_quant', 'deconv.input_fake_quant',
        'depthwise.input_fake_quant', 'linear.input_fake_quant',
    ]  # fmt: skip


REFUSED = {
    'a_qscheme.is_symmetry': (dict(bit=8, is_symmetry=False), 'got False, allowed with .*: True'),
    'a_qscheme.is_signed': (dict(SYMMETRIC, is_signed=False), 'got False, allowed with .*: True'),
    'a_qscheme.is_symmetric_range': (dict(SYMMETRIC, is_symmetric_range=True), 'got True, allowed with .*: False'),
    'a_qscheme.is_per_channel': (dict(SYMMETRIC, is_per_channel=True), 'got True, allowed with .*: False'),
    'a_qscheme.bit': (dict(bit=4, is_symmetry=True), "got 4, allowed with quantizer.backend='tensorrt': 8$"),
    'w_qscheme.bit': (dict(bit=16), 'got 16, allowed with .*: 1 to 8'),
    'w_qscheme.is_symmetry': (dict(bit=8, is_symmetry=False), 'got False, allowed with .*: True'),
}


@pytest.mark.parametrize('field', REFUSED)
def test_schemes_that_it_cannot_run_are_refused(field):
    scheme, message = REFUSED[field]
    config = {**qconfig(a_qscheme=SYMMETRIC), field.partition('.')[0]: scheme}
    with pytest.raises(ValueError, match=f'qconfig.{field}: {message}'):
        quantized(network(), config, SHAPE, backend='tensorrt')


def test_a_file_that_breaks_a_rule_is_not_written(tmp_path):
    config = qconfig(a_qscheme=SYMMETRIC, overrides=[dict(name='conv2', a_qscheme='float')])
    model = calibrate(quantized(network(), config, SHAPE, backend='tensorrt'), images(4, SHAPE))
    with pytest.raises(ValueError, match=r'/conv2/Conv: its input alone is not quantized, .*\(both inputs\)'):
        exporter.write(exported(model), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_only_costs_time_is_written_with_a_warning(tmp_path):
    """Tables of users may quantize more than TensorRT's does."""
    convs = {f'conv{i}': nn.Conv2d(3, 3, 1) for i in range(2)}
    model = quantized(Net(lambda m, x: m.conv1(x + m.conv0(x)), **convs), qconfig(a_qscheme=SYMMETRIC), SHAPE,
                      backend='tensorrt')  # fmt: skip
    network = exported(calibrate(model, images(4, SHAPE)))
    nodes = list(network.onnx.graph.node)
    addition = next(node for node in nodes if node.op_type == 'Add')
    (branch,) = [i for i, name in enumerate(addition.input) if 'conv0' in name]
    more = copy.deepcopy(next(node for node in nodes if node.op_type == 'FakeQuant'))
    more.input[0], more.output[0], more.name = addition.input[branch], 'branch', 'branch'
    addition.input[branch] = 'branch'
    nodes.insert(nodes.index(addition), more)
    nodes = [copy.deepcopy(node) for node in nodes]
    del network.onnx.graph.node[:]
    network.onnx.graph.node.extend(nodes)
    with pytest.warns(UserWarning, match='the result of /network/conv0/Conv is quantized, too'):
        exporter.write(network, tmp_path)
    assert (tmp_path / 'model.onnx').is_file()


def test_layers_are_counted_in_the_file(tmp_path):
    found = layers(exporter.write(exported(prepared('float first layer')), tmp_path))
    assert found.integer == {'Conv': 3, 'ConvTranspose': 1, 'Gemm': 1} and found.float == {'Conv': 1}


@pytest.mark.parametrize(
    'dynamic, shapes',
    [
        ((), ''),
        ((0,), ' --minShapes=input:1x3x32x32 --optShapes=input:8x3x32x32 --maxShapes=input:8x3x32x32'),
    ],
)
def test_commands_that_build_an_engine(dynamic, shapes):
    lines = exporter.next_steps(Path('out/model.onnx'), [8, 3, 32, 32], dynamic)
    assert [line.partition('trtexec')[2] for line in lines] == [
        f' --onnx=out/model.onnx {flag} --saveEngine=out/model.engine{shapes}' for flag in ('--stronglyTyped', '--int8')
    ]


def test_without_tensorrt_it_says_what_stands_in(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'tensorrt', None)
    session = Session(exporter.write(exported(prepared('8 bits')), tmp_path))
    assert session.stand_in.startswith('TensorRT is not there (') and 'ONNX Runtime on CPU' in session.stand_in


def tensorrt_double(shape: tuple[int, ...]) -> mock.MagicMock:
    """What is called of TensorRT when an engine is built; nothing is computed."""
    double = mock.MagicMock()
    double.NetworkDefinitionCreationFlag.STRONGLY_TYPED = 3
    builder = double.Builder.return_value
    builder.create_network.return_value.get_input.return_value.shape = shape
    builder.create_network.return_value.get_input.return_value.name = 'input'
    builder.build_serialized_network.return_value = b'plan'
    return double


@pytest.mark.parametrize('batch, sizes', [(-1, (1, 64)), (8, None)])
def test_calls_that_build_an_engine(batch, sizes, tmp_path, monkeypatch):
    """TensorRT itself is in no test."""
    double = tensorrt_double((batch, 3, 16, 16))
    monkeypatch.setitem(sys.modules, 'tensorrt', double)
    (tmp_path / 'model.onnx').write_bytes(b'file')
    engine = Engine(tmp_path / 'model.onnx')
    runs = []
    monkeypatch.setattr(engine, '_run', lambda x, *_: runs.append(len(x)) or [x])

    (found,) = engine(np.zeros((130 if batch == -1 else 8, 3, 16, 16), np.float32))

    builder = double.Builder.return_value
    builder.create_network.assert_called_once_with(1 << 3)
    assert (tmp_path / 'model.engine').read_bytes() == b'plan'
    assert runs == ([64, 64, 2] if batch == -1 else [8]) and len(found) == sum(runs)
    calls = builder.create_optimization_profile.return_value.set_shape.mock_calls
    assert calls == ([] if sizes is None else [mock.call('input', *((n, 3, 16, 16) for n in (1, 64, 64)))])


def test_what_the_parser_says_is_told(tmp_path, monkeypatch):
    double = tensorrt_double((8, 3, 16, 16))
    parser = double.OnnxParser.return_value
    parser.parse.return_value, parser.num_errors = False, 1
    parser.get_error.return_value = 'no importer'
    monkeypatch.setitem(sys.modules, 'tensorrt', double)
    (tmp_path / 'model.onnx').write_bytes(b'file')
    with pytest.raises(RuntimeError, match='cannot read it:\nno importer'):
        Engine(tmp_path / 'model.onnx')
