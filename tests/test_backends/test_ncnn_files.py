"""ncnn's files: what is read is written again byte by byte, and what is not known is refused by name."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small_models import Net, images, trained
from torch import nn

pytest.importorskip('ncnn', reason='the package ncnn is not installed')
pytest.importorskip('pnnx', reason='the package pnnx is not installed')

import ncnn

from mmrazor_quant.backends.ncnn.bin_file import Array, read_bin, write_bin
from mmrazor_quant.backends.ncnn.convert import Scales
from mmrazor_quant.backends.ncnn.layer_types import LAYOUTS
from mmrazor_quant.backends.ncnn.param_file import Layer, read_param, write_param
from mmrazor_quant.backends.ncnn.pnnx_tool import run_pnnx
from mmrazor_quant.backends.ncnn.table_file import write_table
from mmrazor_quant.backends.ncnn.trace import trace

SHAPE = (3, 8, 8)
WITH_ARRAYS = {
    'Convolution': nn.Conv2d(3, 5, 3),
    'ConvolutionDepthWise': nn.Conv2d(3, 6, 3, groups=3, bias=False),
    'Deconvolution': nn.ConvTranspose2d(3, 5, 2),
    'BatchNorm': nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3)),
    'PReLU': nn.PReLU(3),
    'GroupNorm': nn.GroupNorm(1, 3),
    'InstanceNorm': nn.InstanceNorm2d(3, affine=True),
    'LayerNorm': nn.LayerNorm([8, 8]),
    'InnerProduct': nn.Sequential(nn.Flatten(), nn.Linear(192, 7)),
    'MemoryData': Net(lambda m, x: x + m.table, table=nn.Parameter(torch.randn(3, 8, 8))),
}


def float_files(network: nn.Module, folder):
    script, _ = trace(network.eval(), images(1, SHAPE))
    param, weights = run_pnnx(script, [(1, *SHAPE)], [], folder)
    return read_param(param), param, weights


@pytest.mark.parametrize('kind', WITH_ARRAYS)
def test_files_of_pnnx_are_written_again_as_they_were(kind, tmp_path):
    # A convolution behind shows whether what is in front was read to its end.
    layers, param, weights = float_files(nn.Sequential(trained(WITH_ARRAYS[kind]), nn.Sigmoid()), tmp_path)
    assert kind in {layer.kind for layer in layers}

    write_param(layers, tmp_path / 'again.param')
    write_bin(read_bin(layers, weights), tmp_path / 'again.bin')

    assert (tmp_path / 'again.param').read_text().split() == param.read_text().split()
    assert (tmp_path / 'again.bin').read_bytes() == weights.read_bytes() != b''


def test_ncnn_has_the_layers_that_are_known():
    assert [kind for kind in LAYOUTS if ncnn.layer_to_index(kind) < 0] == []


def test_layers_of_unknown_types_are_named(tmp_path):
    layers, _, weights = float_files(Net(lambda m, x: torch.lgamma(x)), tmp_path)
    with pytest.raises(ValueError, match=r'unknown types: torch.lgamma \(torch.lgamma_\d+\);.* allowed: AbsVal'):
        read_bin(layers, weights)


def test_weights_that_do_not_fit_are_refused(tmp_path):
    layers, _, weights = float_files(nn.Conv2d(3, 5, 3), tmp_path)
    whole = weights.read_bytes()
    wrong = {
        'the .bin file ends within': whole[:-4],
        'of which the layers take': whole + bytes(4),
        r'a weight with the tag 476b3001, allowed: float32': bytes.fromhex('476b3001') + whole[4:],
    }
    for message, content in wrong.items():
        weights.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_bin(layers, weights)


@pytest.mark.parametrize(
    'text, message',
    [('', 'no .param file of ncnn'), ('1\n2 3\n', 'no .param file'), ('7767517\n1 1\nReLU a 1 x\n', 'is damaged')],
)
def test_other_files_are_no_networks(text, message, tmp_path):
    (tmp_path / 'model.param').write_text(text)
    with pytest.raises(ValueError, match=message):
        read_param(tmp_path / 'model.param')


def test_integers_have_their_tag_and_are_filled_up(tmp_path):
    arrays = [Array(np.array([1, -127, 3], np.int8), is_tagged=True), Array(np.array([0.5], np.float32))]
    write_bin([arrays], tmp_path / 'model.bin')
    assert (tmp_path / 'model.bin').read_bytes().hex() == '384b0d00' + '01810300' + '0000003f'


def test_parameters_keep_their_text():
    layer = Layer('Clip', 'clip', ['a'], ['b'], {0: '0.000000e+00', -23303: '2,1,2'})
    assert str(layer).split() == ['Clip', 'clip', '1', '1', 'a', 'b', '0=0.000000e+00', '-23303=2,1,2']
    assert layer.number(7, 3) == 3


def test_the_table_has_weights_first(tmp_path):
    scales = [Scales(name, np.array([127.5, 3.0]), np.array([0.1], np.float32)) for name in ('conv_0', 'fc_1')]
    write_table(scales, tmp_path / 'model.table')
    lines = (tmp_path / 'model.table').read_text().splitlines()
    assert lines == ['conv_0_param_0 127.5 3', 'fc_1_param_0 127.5 3', 'conv_0 0.100000001', 'fc_1 0.100000001']
