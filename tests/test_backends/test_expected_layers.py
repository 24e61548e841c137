"""Which layers should run in integers, by a backend's table."""

from __future__ import annotations

import pytest
import torch
from small_models import Net, calibrate, images, qconfig, quantized, trained
from torch import nn

from mmrazor_quant.backends import BACKENDS
from mmrazor_quant.backends.expected import integer_layers
from mmrazor_quant.backends.intermediate import FAKE_QUANT, export_intermediate, without_quantizers
from mmrazor_quant.backends.onnxruntime import exporter
from mmrazor_quant.backends.onnxruntime.runtime import Session, layers

SHAPE = (3, 12, 12)


def forward(m, x):
    return m.linear(m.act(m.second(m.act(m.first(x)))).mean((2, 3)))


def network(backend, **fields):
    torch.manual_seed(0)
    parts = {'first': nn.Conv2d(3, 8, 3), 'second': nn.Conv2d(8, 8, 3), 'linear': nn.Linear(8, 5), 'act': nn.ReLU()}
    model = quantized(trained(Net(forward, **parts)), qconfig(w=8, a=8, **fields), SHAPE, backend=backend)
    model = calibrate(model, images(8, SHAPE))
    return export_intermediate(model, images(2, SHAPE), lambda net, x: net(x))


FLOAT_INPUT = dict(overrides=[dict(order='first', a_qscheme='float')])


@pytest.mark.parametrize(
    'backend, fields, expected',
    [
        ('openvino', {}, ['/first/Conv', '/second/Conv', '/linear/Gemm']),
        ('onnxruntime', {}, ['/first/Conv', '/second/Conv']),
        ('openvino', FLOAT_INPUT, ['/second/Conv', '/linear/Gemm']),
    ],
)
@torch.no_grad()
def test_layers_with_quantized_inputs_and_results_where_needed(backend, fields, expected):
    found = integer_layers(network(backend, **fields), BACKENDS[backend])
    assert sorted(name.removeprefix('/network') for name in found) == sorted(expected)


@torch.no_grad()
def test_a_float_file_is_the_network_without_quantizers(tmp_path):
    quantized_network = network('onnxruntime')
    plain = without_quantizers(quantized_network)

    file = exporter.write(plain, tmp_path)

    assert FAKE_QUANT in {node.op_type for node in quantized_network.onnx.graph.node}
    assert not layers(file).integer and sum(layers(file).float.values()) == 3
    x = images(2, SHAPE)
    torch.testing.assert_close(torch.from_numpy(Session(file)(x.numpy())[0]), plain.module(x)[0], atol=1e-5, rtol=1e-4)
