"""Quantized networks that compute as a backend does give what its file gives, however deep they are."""

from __future__ import annotations

import copy
import dataclasses
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from small_models import Net, calibrate, images, qconfig, quantized, trained
from torch import Tensor, nn

from mmrazor_quant.backends.deploy import DEPLOYABLE, backend_module
from mmrazor_quant.backends.intermediate import bake_with_grids, export_intermediate
from mmrazor_quant.backends.session import run
from mmrazor_quant.backends.simulation import Addition, FloatLayer, IntegerLayer, Quantize, arithmetic_of, simulated

SHAPE = (3, 32, 32)
RANGE = dict(bit=8, is_symmetry=True, is_symmetric_range=True)
CONFIGS = {
    'onnxruntime': qconfig(),
    'openvino': qconfig(),
    'ncnn': qconfig(a_qscheme=RANGE),
}


class Block(nn.Module):
    """An inverted residual."""

    def __init__(self, source: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        inner = 4 * channels
        self.expand, self.norm = nn.Conv2d(source, inner, 1, bias=False), nn.BatchNorm2d(inner)
        self.depthwise = nn.Conv2d(inner, inner, 3, stride, 1, groups=inner, bias=False)
        self.norm2, self.project = nn.BatchNorm2d(inner), nn.Conv2d(inner, channels, 1, bias=False)
        self.norm3, self.act = nn.BatchNorm2d(channels), nn.ReLU6()
        self.is_residual = source == channels and stride == 1

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.norm(self.expand(x)))
        y = self.norm3(self.project(self.act(self.norm2(self.depthwise(y)))))
        return x + y if self.is_residual else y


def deep() -> nn.Module:
    """A network in which one integer that is rounded the other way changes many behind it."""
    torch.manual_seed(0)
    blocks = [*(Block(16, 16) for _ in range(4)), Block(16, 24, 2), *(Block(24, 24) for _ in range(4))]
    stem, head = nn.Conv2d(3, 16, 3, 2, 1), (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 10))
    return with_statistics(nn.Sequential(stem, nn.ReLU6(), *blocks, *head))


class Stage(nn.Module):
    """Depthwise and pointwise convolutions with SiLU, one branch beside another, and both together."""

    def __init__(self, source: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(source, source, 3, stride, 1, groups=source, bias=False)
        self.pointwise, self.branch = nn.Conv2d(source, channels, 1, bias=False), nn.Conv2d(channels, 16, 1)
        self.norm, self.norm2 = nn.BatchNorm2d(source), nn.BatchNorm2d(channels)
        self.last = nn.Conv2d(channels + 16, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.depthwise(x))
        x = self.norm2(self.pointwise(x * torch.sigmoid(x)))
        x = F.silu(x)
        return F.silu(self.last(torch.cat([x, F.silu(self.branch(x))], 1)))


def smooth() -> nn.Module:
    """Another one, with activations that each backend approximates in its own way, and two layers in float."""
    torch.manual_seed(0)
    stages = [Stage(16, 16), *(Stage(16, 16) for _ in range(3)), Stage(16, 32, 2), *(Stage(32, 32) for _ in range(3))]
    network = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.SiLU(), *stages, nn.Conv2d(32, 8, 1))
    return with_statistics(network)


def with_statistics(network: nn.Module) -> nn.Module:
    """Gives batch norms random weights, and the statistics of images."""
    for norm in network.train().modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.normal_(norm.weight, 1.5, 0.5)
            nn.init.normal_(norm.bias)
            norm.momentum = None
    with torch.no_grad():
        for seed in range(8):
            network(2 * images(16, SHAPE, seed))
    return network.eval()


def prepared(network: nn.Module, backend: str, **quantizer):
    config = quantizer.pop('config', CONFIGS[backend])
    batches = [images(16, SHAPE, seed) for seed in range(4)]
    return calibrate(quantized(network, config, SHAPE, backend=backend, **quantizer), *batches)


def replaced(network: nn.Module) -> list[nn.Module]:
    """What takes the place of operations of the network."""
    return [module for root in network.modules() for module in vars(root).get('simulated', nn.ModuleDict()).values()]


def counted(network: nn.Module) -> Counter:
    return Counter(map(type, replaced(network)))


def deployed(model, backend: str, x: Tensor, folder) -> Tensor:
    for package in {'ncnn': ('ncnn', 'pnnx')}.get(backend, (backend,)):
        pytest.importorskip(package, reason=f'the package {package} is not installed')
    network = export_intermediate(model, x[:1], lambda net, x: net(x))
    file = backend_module(backend, 'exporter').write(network, folder)
    (found,) = run(backend_module(backend, 'runtime').Session(file), x)
    return found


@pytest.mark.parametrize('backend', CONFIGS)
@torch.no_grad()
def test_a_deep_network_gives_what_its_file_gives(backend, tmp_path):
    model, x = prepared(deep(), backend), images(8, SHAPE, 99)
    expected = deployed(model, backend, x, tmp_path)
    simulation = simulated(model, arithmetic_of(backend))
    found = counted(simulation)
    # The last layer's result is not quantized, and so ONNX Runtime has it in float; nor is that of the last addition.
    assert found[IntegerLayer] == (28 if backend == 'onnxruntime' else 29)
    assert found[Addition] == (0 if backend == 'ncnn' else 7)
    assert found[Quantize] == len(list(model.act_quantizers()))
    size = expected.abs().max().item()
    assert (simulation(x) - expected).abs().max().item() < 1e-5 * size
    assert (model.architecture(x) - expected).abs().max().item() > 1e-3 * size, 'training rounds otherwise'


@pytest.mark.parametrize('backend', ['onnxruntime', 'openvino'])
@torch.no_grad()
def test_signed_grids_behind_a_relu(backend, tmp_path):
    """They are cut to their upper half in the file, where others are shifted."""
    model, x = prepared(deep(), backend, config=qconfig(a_qscheme=dict(bit=8, is_symmetry=True))), images(8, SHAPE, 99)
    expected = deployed(model, backend, x, tmp_path)
    found = simulated(model, arithmetic_of(backend))(x)
    assert (found - expected).abs().max().item() < 1e-5 * expected.abs().max().item()


@pytest.mark.parametrize('backend', CONFIGS)
@torch.no_grad()
def test_what_is_float_between_quantizers(backend, tmp_path):
    # The kinds of float convolutions that were compared: ONNX Runtime has other kernels for weights that are not
    # quantized either, OpenVINO for those that are not depthwise.
    names = ('2.depthwise',) if backend == 'openvino' else ('2.depthwise', '2.pointwise')
    schemes = dict(a_qscheme='float') if backend == 'onnxruntime' else dict(w_qscheme='float', a_qscheme='float')
    overrides = [dict(name=name, **schemes) for name in names]
    model, x = prepared(smooth(), backend, config={**CONFIGS[backend], 'overrides': overrides}), images(8, SHAPE, 99)
    expected = deployed(model, backend, x, tmp_path)
    simulation = simulated(model, arithmetic_of(backend))
    found = counted(simulation)
    assert found[FloatLayer] == {'onnxruntime': 3, 'openvino': 1, 'ncnn': 2}[backend]
    assert found[IntegerLayer] == 34 - found[FloatLayer]
    size = expected.abs().max().item()
    assert (simulation(x) - expected).abs().max().item() < 1e-5 * size
    assert (model.architecture(x) - expected).abs().max().item() > 1e-3 * size, 'training rounds otherwise'


def test_the_model_stays_as_it_was():
    model, x = prepared(deep(), 'onnxruntime'), images(2, SHAPE, 99)
    with torch.no_grad():
        before = model.architecture(x)
        simulated(model, arithmetic_of('onnxruntime'))
        assert torch.equal(model.architecture(x), before)
    assert not counted(model)[Quantize]


@torch.no_grad()
def test_copies_compute_alike():
    simulation, x = simulated(prepared(deep(), 'onnxruntime'), arithmetic_of('onnxruntime')), images(2, SHAPE, 99)
    assert torch.equal(copy.deepcopy(simulation)(x), simulation(x))


class Sized(nn.Module):
    """What it computes depends on the size; one result is read by a layer and as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.act = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        y = self.second(self.act(x))
        return y + torch.sigmoid(x) if x.shape[2] > 20 else y - torch.sigmoid(x)


@pytest.mark.parametrize('backend', CONFIGS)
@torch.no_grad()
def test_a_size_that_is_captured_later_computes_as_one_that_was_before(backend):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), Sized(), nn.Conv2d(8, 4, 1))
    model, x = prepared(network, backend), images(4, (3, 16, 12), 99)
    later = simulated(model, arithmetic_of(backend))
    expected = model.architecture(x)
    before = simulated(model, arithmetic_of(backend))
    assert torch.equal(later(x), before(x))
    assert len(replaced(later)) > len(replaced(before)) / 2 > 3
    assert (later(x) - expected).abs().max() < 0.05 * expected.abs().max()


def test_backends_of_which_nothing_is_known():
    known = {backend for backend in DEPLOYABLE if arithmetic_of(backend) is not None}
    assert known == set(CONFIGS)


def shared(m, x):
    return m.second(torch.relu(m.layer(torch.relu(m.layer(x))) + x))


def test_calls_of_one_layer_have_scales_of_their_own():
    torch.manual_seed(0)
    network = Net(shared, layer=nn.Conv2d(3, 3, 3, padding=1), second=nn.Conv2d(3, 4, 1))
    model = prepared(network, 'onnxruntime')
    calls = [m for m in replaced(simulated(model, arithmetic_of('onnxruntime'))) if isinstance(m, IntegerLayer)]
    assert len(calls) == 2 and calls[0].layer is calls[1].layer and calls[0].step != calls[1].step


@torch.no_grad()
def test_sums_are_exact_where_floats_of_32_bits_are_not():
    """What is left of 65,536 large products that cancel, and a small one: in float32 the small one gets lost."""
    half = 2**15
    large, small = torch.full((2, half), 1.27), torch.tensor([[0.01], [0.02]])
    network = nn.Sequential(nn.Flatten(), nn.Linear(2 * half + 1, 2, bias=False))
    network[1].weight.copy_(torch.cat([large, small, -large], 1))
    x = torch.full((1, 1, 1, 2 * half + 1), 2.55)
    x[..., half] = 0.01
    model = quantized(network, qconfig(), tuple(x.shape[1:]), backend='openvino')
    sums = []

    def keep(found: Tensor, factor: Tensor, *_) -> Tensor:
        sums.append(found)
        return found * factor

    arithmetic = dataclasses.replace(arithmetic_of('openvino'), layer=keep)
    simulated(calibrate(model, torch.cat([x, torch.zeros_like(x)])), arithmetic)(x)
    assert sums[0].tolist() == [[1, 2]]


class Part(nn.Module):
    """An island; the convolution is part of another one, too."""

    def __init__(self, source: int, shared: nn.Module, is_float: bool) -> None:
        super().__init__()
        self.first, self.shared, self.norm = nn.Conv2d(source, 8, 1), shared, nn.BatchNorm2d(8)
        self.last = nn.Sequential(nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8)) if is_float else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.norm(self.shared(torch.relu(self.first(x))))))


class Parts(nn.Module):
    """Two islands, between which Python looks at data."""

    def __init__(self) -> None:
        super().__init__()
        shared = nn.Conv2d(8, 8, 3, padding=1)
        self.one, self.two = Part(3, shared, False), Part(8, shared, True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x)
        return self.two(x) if x.mean().item() > -1e9 else x


@torch.no_grad()
def test_norms_of_float_layers_are_folded_and_no_others():
    torch.manual_seed(0)
    float_layer = dict(name='two.last.0', w_qscheme='float', a_qscheme='float')
    model, x = prepared(trained(Parts()), 'openvino', config=qconfig(overrides=[float_layer])), images(2, SHAPE, 5)
    network, weights, _ = bake_with_grids(model)
    assert {'one.first.weight', 'one.shared.weight', 'two.first.weight'} <= weights.keys()
    assert 'two.last.0.weight' not in weights
    assert isinstance(network.one.norm, nn.BatchNorm2d) and isinstance(network.two.last[1], nn.Identity)
    torch.testing.assert_close(network(x), model.architecture(x), rtol=1e-4, atol=1e-5)
    grid, weight = weights['one.shared.weight'], network.one.shared.weight.detach()
    integers = torch.from_numpy(grid.integers(weight.numpy()))
    torch.testing.assert_close(integers * torch.from_numpy(grid.scale).reshape(-1, 1, 1, 1), weight)
