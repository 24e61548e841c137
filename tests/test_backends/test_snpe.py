"""Files for SNPE and QNN: encodings in three versions, float and Q/DQ network."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, numpy_helper
from small_models import Net, calibrate, images, names, qconfig, quantized, trained
from torch import nn

from mmrazor_quant.backends.intermediate import export_intermediate
from mmrazor_quant.backends.qdq_graph import DQ, Q, QdqGraph
from mmrazor_quant.backends.session import run
from mmrazor_quant.backends.snpe import exporter
from mmrazor_quant.backends.snpe.runtime import Session, layers

SHAPE = (3, 16, 16)


def residual(m, x):
    x = m.act(m.norm(m.conv(x)))
    x = m.act(m.norm2(m.conv2(x)) + m.shortcut(x))
    x = torch.cat([m.depthwise(m.pool(x)), m.conv3(m.pool(x))], dim=1)
    return m.linear(m.gap(m.act(x)).flatten(1))


def network() -> nn.Module:
    layers = {
        'conv': nn.Conv2d(3, 16, 3, bias=False), 'conv2': nn.Conv2d(16, 16, 3, padding=1, bias=False),
        'conv3': nn.Conv2d(16, 8, 1), 'shortcut': nn.Conv2d(16, 16, 1),
        'depthwise': nn.Conv2d(16, 16, 1, groups=16), 'linear': nn.Linear(24, 10),
    }  # fmt: skip
    norms = {'norm': nn.BatchNorm2d(16), 'norm2': nn.BatchNorm2d(16)}
    pools = {'pool': nn.MaxPool2d(2), 'gap': nn.AdaptiveAvgPool2d(1)}
    return trained(Net(residual, **layers, **norms, **pools, act=nn.ReLU()))


SYMMETRIC = dict(bit=8, is_symmetry=True)
CONFIGS = {
    'asymmetric': qconfig(),
    'symmetric': qconfig(a_qscheme=SYMMETRIC),
    'signed': qconfig(a_qscheme=dict(bit=8, is_symmetry=False, is_signed=True)),
    '4-bit weights': qconfig(w=4),
    '3-bit weights per tensor': qconfig(w_qscheme=dict(bit=3)),
    '6-bit weights': qconfig(w=6),
    'learned scales': qconfig(
        w=4, w_fake_quant=dict(type='mmrazor.LSQFakeQuantize'), a_fake_quant=dict(type='mmrazor.LSQFakeQuantize')
    ),
}


def prepared(name: str):
    torch.manual_seed(0)
    model = quantized(network(), CONFIGS[name], SHAPE, backend='snpe')
    return calibrate(model, *[images(16, SHAPE, seed) for seed in range(4)])


def exported(model, batch: int = 8, dynamic=()):
    return export_intermediate(model, images(batch, SHAPE), lambda net, x: net(x), dynamic)


def read(folder, version: str) -> dict:
    return json.loads((folder / f'encodings_{version}.json').read_text())


def grids_0_6_1(folder) -> dict[str, np.ndarray]:
    """Step, lowest and highest value of each channel of each tensor."""
    found = read(folder, '0.6.1')
    everything = {**found['activation_encodings'], **found['param_encodings']}
    return {name: np.array([(e['scale'], e['min'], e['max']) for e in each]) for name, each in everything.items()}


def grids_1_0_0(folder) -> dict[str, np.ndarray]:
    found = read(folder, '1.0.0')
    return {
        e['name']: np.array([(s, s * o, s * (o + 2 ** e['bw'] - 1)) for s, o in zip(e['scale'], e['offset'])])
        for e in found['activation_encodings'] + found['param_encodings']
    }


def grids_2_0_0(folder) -> dict[str, np.ndarray]:
    found = {}
    for e in read(folder, '2.0.0')['encodings']:
        unsigned, bits = e['output_dtype'].startswith('u'), int(e['output_dtype'].partition('int')[2])
        low = 0 if unsigned else -(2 ** (bits - 1))
        scale = np.atleast_1d(e['y_scale'])
        ends = np.array([low, low + 2**bits - 1]) - e.get('y_zero_point', 0)
        found[e['name']] = np.stack([scale, scale * ends[0], scale * ends[1]], axis=1)
    return found


@pytest.mark.parametrize('name', CONFIGS)
@torch.no_grad()
def test_three_versions_say_the_grids_of_the_network(name, tmp_path):
    model = prepared(name)
    intermediate = exported(model)
    exporter.write(intermediate, tmp_path)
    old, middle, new = grids_0_6_1(tmp_path), grids_1_0_0(tmp_path), grids_2_0_0(tmp_path)

    assert old.keys() == middle.keys() == new.keys()
    for tensor in old:
        np.testing.assert_allclose(middle[tensor], old[tensor], rtol=1e-12)
        np.testing.assert_allclose(new[tensor], old[tensor], rtol=1e-12)
    for tensor, grid in intermediate.weights.items():
        np.testing.assert_array_equal(old[tensor][:, 0], grid.scale)
        lowest = (grid.quant_min - grid.zero_point) * grid.scale.astype(np.float64)
        # Integers of 3 bits are stored in 4, those of 6 in 8.
        assert (old[tensor][:, 1] <= lowest).all()
        if grid.quant_max - grid.quant_min in (15, 255):
            np.testing.assert_allclose(old[tensor][:, 1], lowest, rtol=1e-12)
    expected = {
        (float(g.scale[0]), (g.quant_min - g.zero_point[0]) * g.scale[0], (g.quant_max - g.zero_point[0]) * g.scale[0])
        for g in intermediate.activations.values()
    }
    found = {tuple(old[tensor][0]) for tensor in old.keys() - intermediate.weights.keys()}
    assert len(found) == len(expected)
    np.testing.assert_allclose(sorted(found), sorted(expected), rtol=1e-6)


def test_encodings_in_full(tmp_path):
    """Of one activation and one weight, with the types that the schemas ask for."""
    exporter.write(exported(prepared('asymmetric')), tmp_path)
    old, middle, new = (read(tmp_path, version) for version in ('0.6.1', '1.0.0', '2.0.0'))
    (activation,) = old['activation_encodings']['input']
    assert activation['is_symmetric'] == 'False' and activation['dtype'] == 'int' and activation['bitwidth'] == 8
    zero_point = -activation['offset']
    assert 0 < zero_point < 255
    scale = activation['scale']
    assert next(e for e in middle['activation_encodings'] if e['name'] == 'input') == {
        'name': 'input', 'dtype': 'INT', 'bw': 8, 'is_sym': False, 'enc_type': 'PER_TENSOR', 'scale': [scale],
        'offset': [-zero_point],
    }  # fmt: skip
    entries = {e['name']: e for e in new['encodings']}
    expected = {'name': 'input', 'output_dtype': 'uint8', 'y_scale': scale, 'y_zero_point': zero_point}
    assert entries['input'] == expected
    weight = next(e for e in middle['param_encodings'] if e['name'] == 'network.conv.weight')
    assert weight['is_sym'] is True and weight['enc_type'] == 'PER_CHANNEL' and weight['offset'] == [-128] * 16
    assert [e['is_symmetric'] for e in old['param_encodings']['network.conv.weight']] == ['True'] * 16
    entry = entries['network.conv.weight']
    assert entry.keys() == {'name', 'output_dtype', 'y_scale', 'axis'} and entry['axis'] == 0
    assert entry['output_dtype'] == 'int8' and entry['y_scale'] == weight['scale']


def test_names_are_those_of_the_float_file(tmp_path):
    exporter.write(exported(prepared('asymmetric')), tmp_path)
    model = onnx.load(str(tmp_path / 'model.onnx'))
    assert not {Q, DQ, 'FakeQuant'} & {node.op_type for node in model.graph.node}
    activations = {'input', *(name for node in model.graph.node for name in node.output)}
    weights = {i.name for i in model.graph.initializer}
    found = read(tmp_path, '0.6.1')
    assert found['activation_encodings'].keys() <= activations and found['param_encodings'].keys() <= weights
    # A convolution and the activation behind it are one; everything else has a grid, the network's result as well.
    without = activations - found['activation_encodings'].keys()
    graph = QdqGraph(model)
    assert {node.op_type for name in without for node in graph.readers[name]} == {'Relu'}
    assert 'output_0' in found['activation_encodings']


@pytest.mark.parametrize('name', ['asymmetric', '4-bit weights', 'learned scales'])
def test_weights_of_the_float_file_lie_on_their_grid(name, tmp_path):
    intermediate = exported(prepared(name))
    exporter.write(intermediate, tmp_path)
    stored = {i.name: numpy_helper.to_array(i) for i in onnx.load(str(tmp_path / 'model.onnx')).graph.initializer}
    for tensor, grid in intermediate.weights.items():
        real = grid.integers(stored[tensor]) * grid.scale.reshape(-1, *[1] * (stored[tensor].ndim - 1))
        np.testing.assert_allclose(stored[tensor], real, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize('name', CONFIGS)
@torch.no_grad()
def test_the_qdq_file_computes_what_the_network_does(name, tmp_path):
    model = prepared(name)
    x = images(36, SHAPE, 9)
    expected = model(x)

    (found,) = run(Session(exporter.write(exported(model), tmp_path)), x)

    difference = (found - expected).abs() / expected.abs().max()
    assert difference.median() < 2e-3 and difference.max() < 0.1
    assert (found.argmax(1) == expected.argmax(1)).float().mean() > 0.9


@torch.no_grad()
def test_the_float_file_is_the_network_without_its_activations_grids(tmp_path):
    model = prepared('asymmetric')
    x = images(8, SHAPE, 9)
    exporter.write(exported(model), tmp_path)
    session = onnxruntime.InferenceSession(str(tmp_path / 'model.onnx'), providers=['CPUExecutionProvider'])
    model.set_quant_state(False, True, False, False)
    found = torch.from_numpy(session.run(None, {'input': x.numpy()})[0])
    torch.testing.assert_close(found, model(x), rtol=1e-3, atol=1e-3)


def test_weights_of_four_bits_take_half_a_byte(tmp_path):
    files = {}
    for name in ('asymmetric', '4-bit weights'):
        (tmp_path / name).mkdir()
        files[name] = exporter.write(exported(prepared(name)), tmp_path / name)
    kinds = {
        name: Counter(i.data_type for i in onnx.load(str(file)).graph.initializer if 'weight.integers' in i.name)
        for name, file in files.items()
    }
    count = kinds['asymmetric'][onnx.TensorProto.INT8]
    assert count > 3 and kinds['asymmetric'] == {onnx.TensorProto.INT8: count}
    assert kinds['4-bit weights'] == {onnx.TensorProto.INT4: count}
    stored = [i for i in onnx.load(str(files['4-bit weights'])).graph.initializer if 'weight.integers' in i.name]
    assert all(len(i.raw_data) + len(i.int32_data) <= (np.prod(i.dims) + 1) // 2 for i in stored)


@pytest.mark.parametrize('name', CONFIGS)
def test_every_operation_stands_between_pairs_of_uint8(name, tmp_path):
    graph = QdqGraph(onnx.load(str(exporter.write(exported(prepared(name)), tmp_path))))
    for node in graph.model.graph.node:
        if node.op_type == Q:
            assert graph.integer_type(node) == TensorProto.UINT8
        elif node.op_type != DQ:
            assert node.op_type != 'Clip'
            fused = [graph.made_by(name, 'Conv', 'Add', 'Concat') for name in node.input if node.op_type == 'Relu']
            assert any(fused) or all(graph.made_by(name, DQ) for name in node.input)
            readers = {reader.op_type for name in node.output for reader in graph.readers[name]}
            assert readers in ({Q}, {'Relu'})
    assert graph.made_by('output_0', DQ) is not None


def test_biases_are_int32_on_the_grid_of_the_products(tmp_path):
    graph = QdqGraph(onnx.load(str(exporter.write(exported(prepared('asymmetric')), tmp_path))))
    before = QdqGraph(onnx.load(str(tmp_path / 'model.onnx')))
    # In the float file they are what training and evaluation round them to.
    biases = {node.name: before.values(node.input[2]) for node in before.nodes('Conv', 'Gemm')}
    layers = list(graph.nodes('Conv', 'Gemm'))
    assert len(layers) == 6
    for node in layers:
        pairs = [graph.made_by(name, DQ) for name in node.input]
        scales = [graph.scale_and_zero_point(pair)[0] for pair in pairs]
        np.testing.assert_allclose(scales[2], scales[0] * scales[1], rtol=1e-6)
        integers = graph.constants[pairs[2].input[0]]
        np.testing.assert_allclose(numpy_helper.to_array(integers) * scales[2], biases[node.name], rtol=1e-5, atol=1e-9)
        assert graph.integer_type(pairs[2]) == TensorProto.INT32 and graph.integer_type(pairs[1]) == TensorProto.INT8


def test_results_of_all_operations_are_quantized():
    found = names(prepared('asymmetric').act_quantizers())
    assert {'linear.output_fake_quant', 'add_input0_fake_quant', 'add_output_fake_quant'} <= {*found}


def test_layers_are_counted_in_the_file(tmp_path):
    found = layers(exporter.write(exported(prepared('asymmetric')), tmp_path))
    assert found.integer == {'Conv': 5, 'Gemm': 1} and found.float == {}


def test_sizes_that_vary_are_refused(tmp_path):
    with pytest.raises(ValueError, match='--dynamic-batch, --dynamic-size: given, allowed with --backend snpe'):
        exporter.write(exported(prepared('asymmetric'), dynamic=(0,)), tmp_path)


def test_a_tensor_with_two_grids_is_refused(tmp_path):
    config = qconfig(overrides=[dict(name='conv2', a_qscheme=SYMMETRIC)])
    model = calibrate(quantized(network(), config, SHAPE, backend='snpe'), images(4, SHAPE))
    with pytest.raises(ValueError, match=r'quantized to \[.*, allowed in encodings: one grid a tensor'):
        exporter.write(exported(model), tmp_path)


REFUSED = {
    'a_qscheme.bit': (dict(bit=4, is_symmetry=False), "got 4, allowed with quantizer.backend='snpe': 8$"),
    'a_qscheme.is_symmetric_range': (dict(SYMMETRIC, is_symmetric_range=True), 'got True, allowed with .*: False'),
    'a_qscheme.is_per_channel': (dict(SYMMETRIC, is_per_channel=True), 'got True, allowed with .*: False'),
    'w_qscheme.bit': (dict(bit=16), 'got 16, allowed with .*: 1 to 8'),
    'w_qscheme.is_symmetry': (dict(bit=8, is_symmetry=False), 'got False, allowed with .*: True'),
}


@pytest.mark.parametrize('field', REFUSED)
def test_schemes_that_it_cannot_run_are_refused(field):
    scheme, message = REFUSED[field]
    config = {**qconfig(), field.partition('.')[0]: scheme}
    with pytest.raises(ValueError, match=f'qconfig.{field}: {message}'):
        quantized(network(), config, SHAPE, backend='snpe')
