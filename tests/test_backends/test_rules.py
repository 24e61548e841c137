"""A backend's table decides where quantizers go, and which schemes are refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small_models import Net, calibrate, images, names, qconfig, quantized
from torch import nn

from mmrazor_quant.backends.grid import QuantGrid
from mmrazor_quant.backends.intermediate import export_intermediate

REFUSED = {
    'w_qscheme.bit': (dict(bit=9), 'qconfig.w_qscheme.bit: got 9, allowed with quantizer.backend={!r}: 1 to 8'),
    'a_qscheme.bit': (dict(bit=16), 'qconfig.a_qscheme.bit: got 16, allowed with quantizer.backend={!r}: 1 to 8'),
    'w_qscheme.is_symmetry': (dict(is_symmetry=False), 'qconfig.w_qscheme.is_symmetry: got False, allowed'),
    'w_qscheme.is_signed': (dict(is_signed=False), 'qconfig.w_qscheme.is_signed: got False, allowed'),
    'a_qscheme.is_per_channel': (dict(is_per_channel=True), 'qconfig.a_qscheme.is_per_channel: got True, allowed'),
}


def additions(m, x):
    x = m.act(m.conv(x))
    x = m.act(m.conv2(x) + x)
    return m.conv3(x) + m.conv4(x)


def net() -> nn.Module:
    convs = {f'conv{i}': nn.Conv2d(4, 4, 3, padding=1) for i in (2, 3, 4)}
    return Net(additions, conv=nn.Conv2d(3, 4, 3), **convs, act=nn.ReLU())


def test_both_inputs_of_additions_for_onnxruntime():
    found = names(quantized(net(), backend='onnxruntime', config=qconfig()).act_quantizers())
    # The sum goes into two convolutions, which share a quantizer.
    assert sorted(found) == [
        'add_input0_1_fake_quant', 'add_input0_fake_quant', 'add_input1_1_fake_quant', 'conv.input_fake_quant',
        'conv2.input_fake_quant', 'conv3.input_fake_quant',
    ]  # fmt: skip


def test_the_residual_side_alone_for_openvino():
    found = names(quantized(net(), backend='openvino', config=qconfig()).act_quantizers())
    assert sorted(found) == [
        'add_input0_1_fake_quant', 'conv.input_fake_quant', 'conv2.input_fake_quant', 'conv3.input_fake_quant'
    ]  # fmt: skip


@pytest.mark.parametrize('backend', ['onnxruntime', 'openvino'])
@pytest.mark.parametrize('field', REFUSED)
def test_what_a_backend_cannot_run_is_refused(backend, field):
    changes, message = REFUSED[field]
    name = field.partition('.')[0]
    with pytest.raises(ValueError) as error:
        quantized(net(), qconfig(**{name: changes}), backend=backend)
    assert message.format(backend) in str(error.value)


def test_an_override_is_checked_too():
    overrides = [dict(order='last', a_qscheme=dict(bit=12))]
    with pytest.raises(ValueError, match=r'qconfig.overrides\[0\].a_qscheme.bit: got 12'):
        quantized(net(), qconfig(overrides=overrides), backend='onnxruntime')


def test_an_offset_that_is_no_integer_cannot_be_exported():
    kind = dict(type='mmrazor.LSQPlusFakeQuantize')
    model = calibrate(quantized(net(), qconfig(a_fake_quant=kind, a_qscheme=dict(bit=8, is_symmetry=False))))
    with pytest.raises(ValueError, match=r'conv\.input_fake_quant: the offset of'):
        export_intermediate(model, images(), lambda network, x: network(x))


def test_result_in_front_of_an_activation_in_place_is_quantized():
    modules = {'conv': nn.Conv2d(3, 4, 3), 'act': nn.SiLU(inplace=True), 'conv2': nn.Conv2d(4, 4, 3)}
    model = quantized(Net(lambda m, x: m.conv2(m.act(m.conv(x))), **modules), qconfig(), backend='onnxruntime')
    found = names(model.act_quantizers())
    assert sorted(found) == ['conv.input_fake_quant', 'conv.output_fake_quant', 'conv2.input_fake_quant']


def test_a_layer_that_is_to_stay_float_reads_float():
    def branches(m, x):
        x = m.act(m.conv(x))
        return m.conv2(x) + m.conv3(x).mean()

    overrides = [dict(name='conv3', w_qscheme='float', a_qscheme='float')]
    convs = {'conv': nn.Conv2d(3, 4, 3), 'conv2': nn.Conv2d(4, 4, 3), 'conv3': nn.Conv2d(4, 4, 3)}
    network = Net(branches, **convs, act=nn.ReLU())
    model = quantized(network, qconfig(a=2, overrides=overrides), backend='onnxruntime')
    seen = []
    model.architecture.conv3.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    calibrate(model)(images())
    assert len(seen[-1].unique()) > 4


def test_scales_that_follow_from_the_weight_are_those_of_the_file():
    config = qconfig(w=4, w_fake_quant=dict(type='mmrazor.DoReFaFakeQuantize', rescale=False))
    model = calibrate(quantized(net(), config))
    network = export_intermediate(model, images(), lambda network, x: network(x))
    weight = model.bake().conv.weight.detach().numpy()
    grid = network.weights['network.conv.weight']
    real = (grid.integers(weight) - grid.zero_point.reshape(-1, 1, 1, 1)) * grid.scale.reshape(-1, 1, 1, 1)
    np.testing.assert_allclose(real, weight, rtol=1e-6, atol=1e-7)


def test_integers_of_a_grid_are_those_of_training():
    model = calibrate(quantized(net(), qconfig(w=4, a=4)))
    quantizer = model.architecture.conv.weight_fake_quant
    grid = QuantGrid.of(quantizer, 'conv.weight_fake_quant')
    weight = model.architecture.conv.weight.detach()
    real = torch.from_numpy(grid.integers(weight.numpy())).float() * quantizer.scale.reshape(-1, 1, 1, 1)
    assert torch.equal(real, quantizer(weight))
