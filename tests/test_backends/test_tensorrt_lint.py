"""Every rule of TensorRT finds a file that breaks it, and names the node; a file that obeys them has no findings."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from mmrazor_quant.backends.tensorrt.lint import RULES, lint

SHAPE = [2, 4, 6, 6]


class Net:
    """A file that grows node by node."""

    def __init__(self, opset: int = 21) -> None:
        self.opset, self.nodes, self.values = opset, [], []

    def constant(self, values: np.ndarray, kind: int | None = None) -> str:
        name = f'constant{len(self.values)}'
        values = np.asarray(values)
        tensor = numpy_helper.from_array(values, name)
        if kind is not None:
            tensor = helper.make_tensor(name, kind, values.shape, values.flatten().tolist())
        self.values.append(tensor)
        return name

    def add(self, kind: str, *inputs: str, name: str = '', **attributes: int) -> str:
        output = f'{kind}{len(self.nodes)}'
        self.nodes.append(helper.make_node(kind, inputs, [output], name, **attributes))
        return output

    def pair(self, x: str, scale=0.1, zero_point=0, kind=TensorProto.INT8, name='pair', between: str = '', **axis: int):
        scale = self.constant(np.asarray(scale, np.float32))
        zero = self.constant(np.asarray(zero_point, np.int64), kind)
        q = self.add('QuantizeLinear', x, scale, zero, name=f'{name}.q', **axis)
        q = self.add(between, q, name=between) if between else q
        return self.add('DequantizeLinear', q, scale, zero, name=f'{name}.dq', **axis)

    def weight(self, shape=(8, 4, 3, 3)) -> str:
        return self.constant(np.ones(shape, np.float32))

    def conv(self, x: str, weight: str, name: str = 'conv') -> str:
        return self.add('Conv', x, weight, name=name)

    def model(self, output: str) -> ModelProto:
        given = helper.make_tensor_value_info('input', TensorProto.FLOAT, SHAPE)
        result = helper.make_tensor_value_info(output, TensorProto.FLOAT, None)
        graph = helper.make_graph(self.nodes, 'network', [given], [result], self.values)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid('', self.opset)])


def good(**changes) -> ModelProto:
    """Two quantized convolutions and a residual addition, with changes to the first activation's pair."""
    net = Net()
    x = net.conv(net.pair('input', **changes), net.pair(net.weight(), [0.1] * 8, [0] * 8, name='weight', axis=0))
    y = net.pair(net.add('Relu', x), name='second')
    weight = net.pair(net.weight((8, 8, 1, 1)), 0.1, name='weight2')
    return net.model(net.add('Add', net.conv(y, weight, 'conv2'), y, name='sum'))


def opset() -> ModelProto:
    return Net(opset=12).model('input')


def operations() -> ModelProto:
    net = Net()
    scale, zero = net.constant(np.float32(0.1)), net.constant(np.int8(0))
    q = net.add('QuantizeLinear', 'input', scale, zero)
    return net.model(net.add('QLinearAdd', q, scale, zero, q, scale, zero, scale, zero, name='sum'))


def constants() -> ModelProto:
    net = Net()
    scale = net.add('ReduceMax', net.add('Abs', 'input'), keepdims=0)
    q = net.add('QuantizeLinear', 'input', scale, net.constant(np.int8(0)), name='pair.q')
    return net.model(q)


def activations_per_tensor() -> ModelProto:
    return good(scale=[0.1] * 4, zero_point=[0] * 4, axis=1)


def a_weight(shape, scale, axis, kind='Conv', **attributes) -> ModelProto:
    net = Net()
    weight = net.pair(net.weight(shape), scale, np.zeros_like(scale, dtype=np.int64), name='weight', axis=axis)
    return net.model(net.add(kind, net.pair('input'), weight, **attributes))


def blocks() -> ModelProto:
    return a_weight((8, 4), np.ones((4, 2)), 0, 'MatMul')


def four_bits(shape, weight: bool = True) -> ModelProto:
    net = Net()
    pair = net.pair(net.weight(shape) if weight else 'input', kind=TensorProto.INT4)
    return net.model(net.add('MatMul', 'input', pair))


def both_inputs() -> ModelProto:
    net = Net()
    return net.model(net.conv('input', net.pair(net.weight())))


def both_sides() -> ModelProto:
    net = Net()
    x = net.pair('input')
    y = net.pair(net.conv(x, net.pair(net.weight((4, 4, 1, 1)), name='weight')), name='branch')
    return net.model(net.add('Add', x, y, name='sum'))


def results() -> ModelProto:
    net = Net()
    return net.model(net.add('Sigmoid', net.add('Flatten', net.pair('input'))))


BROKEN = {
    'opset': ('opset', opset, 'network', 'opset 12, allowed: 13'),
    'operations': ('operations', operations, 'sum', 'QLinearAdd, allowed'),
    'constants': ('constants', constants, 'pair.q', 'is computed'),
    'zero points': ('zero points', lambda: good(zero_point=3), 'pair.q', 'zero point 3, allowed: 0'),
    'positive scales: zero': ('positive scales', lambda: good(scale=0.0), 'pair.dq', 'scale 0'),
    'positive scales: inf': ('positive scales', lambda: good(scale=np.inf), 'pair.q', 'scale inf'),
    'counts': ('counts', lambda: good(zero_point=[0, 0]), 'pair.q', '2 zero points, allowed: as many as scales, 1'),
    'types: uint8': ('types', lambda: good(kind=TensorProto.UINT8), 'pair.q', 'type UINT8, allowed: INT8, INT4'),
    'types: int16': ('types', lambda: good(kind=TensorProto.INT16), 'pair.dq', 'type INT16'),
    'float biases': ('float biases', lambda: good(kind=TensorProto.INT32), 'pair.dq', 'an int32 tensor'),
    'nothing between: Clip': ('nothing between', lambda: good(between='Clip'), 'pair.q', 'Clip reads its integers'),
    'nothing between: Relu': ('nothing between', lambda: good(between='Relu'), 'pair.q', 'Relu reads its integers'),
    'activations per tensor': ('activations per tensor', activations_per_tensor, 'pair.q', '4 scales'),
    'weights per channel: conv': (
        'weights per channel', lambda: a_weight((8, 4, 3, 3), [0.1] * 4, 1), 'weight.dq',
        '4 scales along dimension 1 of [8, 4, 3, 3], allowed for Conv: 8 along 0',
    ),
    'weights per channel: deconv': (
        'weights per channel', lambda: a_weight((4, 8, 3, 3), [0.1] * 4, 0, 'ConvTranspose'), 'weight.dq', '8 along 1'
    ),
    'weights per channel: Gemm': (
        'weights per channel', lambda: a_weight((8, 4), [0.1] * 4, 1, 'Gemm', transB=1), 'weight.dq', '8 along 0'
    ),
    'weights per channel: MatMul': (
        'weights per channel', lambda: a_weight((6, 8), [0.1] * 6, 0, 'MatMul'), 'weight.dq', '8 along 1'
    ),
    'weights per channel: length': (
        'weights per channel', lambda: a_weight((8, 4, 3, 3), [0.1] * 7, 0), 'weight.dq', '7 scales along dimension 0'
    ),
    'blocks': ('blocks', blocks, 'weight.q', 'scales [4, 2] of [8, 4], allowed: blocks in one dimension'),
    'four bits: odd': ('four bits', lambda: four_bits((6, 3)), 'pair.q', 'weight of [6, 3], allowed: an even last'),
    'four bits: activation': ('four bits', lambda: four_bits((6, 4), False), 'pair.dq', 'INT4 for an activation'),
    'both inputs': ('both inputs', both_inputs, 'conv', 'its input alone is not quantized'),
    'residual side': ('residual side', both_sides, 'sum', 'the result of conv is quantized, too'),
    'results': ('results', results, 'pair.dq', 'quantized for Sigmoid'),
}  # fmt: skip


@pytest.mark.parametrize('case', BROKEN)
def test_a_broken_rule_is_found(case):
    rule, make, node, what = BROKEN[case]
    findings = [finding for finding in lint(make()) if finding.rule == rule]
    assert node in {finding.node for finding in findings}
    assert any(what in str(finding) for finding in findings if finding.node == node)


def test_every_rule_has_a_case():
    assert {rule for rule, *_ in BROKEN.values()} == set(RULES)


GOOD = {
    'residual network': good,
    'per tensor': lambda: a_weight((8, 4, 3, 3), 0.1, 0),
    'deconvolution': lambda: a_weight((4, 8, 3, 3), [0.1] * 8, 1, 'ConvTranspose'),
    'Gemm': lambda: a_weight((8, 4), [0.1] * 8, 0, 'Gemm', transB=1),
    'MatMul': lambda: a_weight((6, 8), [0.1] * 8, 1, 'MatMul'),
    'blocks': lambda: a_weight((6, 8), np.ones((2, 8)), 0, 'MatMul'),
    'weights of four bits alone': lambda: four_bits((6, 4)),
    'FP8': lambda: good(kind=TensorProto.FLOAT8E4M3FN),
}


@pytest.mark.parametrize('case', GOOD)
def test_good_files_have_no_findings(case):
    assert lint(GOOD[case]()) == []


def test_an_activation_of_uint8_breaks_two_rules():
    """As a file for ONNX Runtime has them."""
    found = {finding.rule for finding in lint(good(kind=TensorProto.UINT8, zero_point=128))}
    assert found == {'types', 'zero points'}
