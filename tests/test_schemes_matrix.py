"""Every combination of bits, symmetry, granularity and scale, on a network, against the same network in NumPy.

One kind of tensor is quantized at a time. NumPy computes in float64, torch in float32, so a value on the edge between
two steps may go either way: there, and only there, the NumPy network goes on with the neighbour that torch chose.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import product

import numpy as np
import pytest
import torch
from small_models import calibrate, images, quantized, trained
from torch import nn

from mmrazor_quant.quantizers import CustomQuantizer

BITS = (1, 2, 3, 4, 5, 8, 12, 16, 24, 32)
NOISE = 2e-6
"""How far apart the same value is in the two networks, relative to the largest value of the tensor."""

FOLLOWED = 12
"""With more bits a step is no more than a few times the noise: a flip makes no difference that could be told."""

COUNTED = (16, 24)
"""Here it is counted instead how many values lie on the grid, among those of so few steps that float32 can tell."""

QParams = tuple[np.ndarray, np.ndarray]


def network() -> nn.Module:
    torch.manual_seed(0)
    return trained(
        nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3, stride=2),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5),
        )
    ).eval()  # fmt: skip


# -- the network in NumPy ----------------------------------------------------------------------------------------------


@dataclass
class Grid:
    """A scheme, and which values share a range: ``axis`` None for all, else those of one index of these dimensions."""

    bit: int
    symmetric: bool
    pot: bool
    axis: tuple[int, ...] | None

    @property
    def low(self) -> int:
        return -(2 ** (self.bit - 1)) if self.symmetric else 0

    @property
    def high(self) -> int:
        return 2 ** (self.bit - 1) - 1 if self.symmetric else 2**self.bit - 1

    def qparams(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Scale and zero point from minima and maxima, with the dimensions of ``x``."""
        others = tuple(d for d in range(x.ndim) if d not in (self.axis or ()))
        start = np.minimum(x.min(others, keepdims=True), 0.0)
        end = np.maximum(x.max(others, keepdims=True), 0.0)
        if not self.symmetric:
            scale = (end - start) / (self.high - self.low)
        elif self.high == 0:
            scale = start / self.low
        else:
            scale = np.maximum(-start, end) / ((self.high - self.low) / 2)
        scale = np.where(scale == 0, 1.0, scale)
        scale = 2.0 ** np.round(np.log2(scale)) if self.pot else scale.astype(np.float32).astype(np.float64)
        zero = np.zeros_like(scale) if self.symmetric else np.clip(
            self.low - np.rint(start / scale), self.low, self.high)  # fmt: skip
        return scale, zero


@dataclass
class Follower:
    """Quantizes in NumPy, and looks at what torch made of the same tensor where the two may differ."""

    grid: Grid
    found: dict[str, np.ndarray]
    on_grid: list[bool] = field(default_factory=list)

    def __call__(self, name: str, x: np.ndarray, qparams: Callable[[np.ndarray], QParams]) -> np.ndarray:
        scale, zero = qparams(x)
        found = self.found[name].astype(np.float64)
        if self.grid.bit in COUNTED:
            # The scale of torch's own input: another one in its last bits would not do.
            steps = found / qparams(self.found[f'{name} input'].astype(np.float64))[0]
            self.on_grid += list(np.abs(steps - np.rint(steps))[np.abs(steps) < 2**18] < 0.1)
        edge = NOISE * np.abs(x).max() / scale
        first, last = (
            np.clip(np.rint(x / scale + side) + zero, self.grid.low, self.grid.high) for side in (-edge, edge)
        )
        y = (np.clip(np.rint(x / scale) + zero, self.grid.low, self.grid.high) - zero) * scale
        if self.grid.bit <= FOLLOWED:
            either = first != last
            # By chance; and the extreme value of a symmetric range is half a step beyond the last integer.
            extremes = scale.size if self.grid.symmetric else 0
            assert either.sum() <= 2 + extremes + 6 * NOISE * 2**self.grid.bit * x.size
            chosen = np.clip(np.rint(found / scale) + zero, first, last)
            y = np.where(either, (chosen - zero) * scale, y)
        return y


def convolution(x: np.ndarray, weight: np.ndarray, padding: int = 0, stride: int = 1) -> np.ndarray:
    """Through the patches."""
    x = np.pad(x, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
    patches = np.lib.stride_tricks.sliding_window_view(x, weight.shape[2:], (2, 3))[:, :, ::stride, ::stride]
    return np.einsum('nchwij,ocij->nohw', patches, weight)


def in_numpy(parameters: dict[str, np.ndarray], x: np.ndarray, weight, activation) -> np.ndarray:
    """The network; ``weight`` and ``activation`` are called with a layer's name and tensor."""
    p = parameters
    factor = p['1.weight'] / np.sqrt(p['1.running_var'] + 1e-5)
    folded = p['0.weight'] * factor.reshape(-1, 1, 1, 1)
    shift = p['1.bias'] - p['1.running_mean'] * factor
    x = convolution(activation('0', x), weight('0', folded), padding=1) + shift.reshape(1, -1, 1, 1)
    x = np.maximum(x, 0.0)
    x = convolution(activation('3', x), weight('3', p['3.weight']), stride=2) + p['3.bias'].reshape(1, -1, 1, 1)
    x = x.mean((2, 3))
    return activation('6', x) @ weight('6', p['6.weight']).T + p['6.bias']


def same(name: str, x: np.ndarray) -> np.ndarray:
    return x


# -- the comparison ----------------------------------------------------------------------------------------------------


def parameters_of(module: nn.Module) -> dict[str, np.ndarray]:
    return {key: value.double().numpy() for key, value in module.state_dict().items()}


def record(model: nn.Module, kind: str) -> dict[str, np.ndarray]:
    """What the quantizers make of their tensors, by layer, filled while the model runs."""
    found: dict[str, np.ndarray] = {}

    def note(name: str, x: torch.Tensor, y: torch.Tensor) -> None:
        found[name], found[f'{name} input'] = y.detach().numpy(), x.detach().numpy()

    for name in ('0', '3', '6'):
        quantizer = model.architecture.get_submodule(f'{name}.{kind}_fake_quant')
        quantizer.register_forward_hook(lambda m, args, y, name=name: note(name, args[0], y))
    return found


def check(config: dict, kind: str, expected_of, counts: bool = True) -> None:
    """Compare the quantized network with its NumPy counterpart on other data than those of calibration."""
    module = network()
    parameters = parameters_of(module)
    model = calibrate(quantized(module, config))
    assert len(list(model.weight_quantizers())) == (3 if kind == 'weight' else 0)
    assert len(list(model.act_quantizers())) == (0 if kind == 'weight' else 3)
    found = record(model, kind)
    x = images(4, seed=1)
    with torch.no_grad():
        y = model(x)
    converted = model.convert()(x).detach()

    expected, follower = expected_of(parameters, x.double().numpy(), found)

    assert len(found) == 6
    bit = follower.grid.bit
    tolerance = {16: 1e-4}.get(bit, 2e-5) * np.abs(expected).max()
    assert np.abs(y.numpy() - expected).max() <= tolerance
    assert torch.allclose(converted, y, rtol=1e-4, atol=tolerance)
    unquantized = in_numpy(parameters, x.double().numpy(), same, same)
    if bit in COUNTED and counts:
        assert len(follower.on_grid) >= 3 and all(follower.on_grid)
    if bit <= 8:
        assert np.abs(expected - unquantized).max() > 20 * tolerance
    elif bit >= 24 and kind == 'weight' and not follower.grid.pot:  # where nothing is clipped
        assert np.abs(y.numpy() - unquantized).max() <= tolerance


def scheme(bit: int, symmetric: bool, channels: bool, pot: bool) -> dict:
    return dict(bit=bit, is_symmetry=symmetric, is_per_channel=channels, is_pot_scale=pot)


OBSERVERS = dict(w_observer=dict(type='mmrazor.MinMaxObserver'), a_observer=dict(type='mmrazor.MinMaxObserver'))
FLAGS = [
    pytest.param(*flags, id='-'.join(n for n, flag in zip(('symmetric', 'channels', 'pot'), flags) if flag) or 'plain')
    for flags in product((False, True), repeat=3)
]
matrix = pytest.mark.parametrize('symmetric, channels, pot', FLAGS)
bits = pytest.mark.parametrize('bit', BITS)


@bits
@matrix
def test_weights(bit, symmetric, channels, pot):
    def expected(parameters, x, found):
        follower = Follower(Grid(bit, symmetric, pot, (0,) if channels else None), found)

        def weight(name, w):
            return follower(name, w, follower.grid.qparams)

        return in_numpy(parameters, x, weight, same), follower

    check(dict(OBSERVERS, w_qscheme=scheme(bit, symmetric, channels, pot), a_qscheme='float'), 'weight', expected)


@pytest.mark.parametrize('bit', [3, 8])
def test_weights_with_scales_of_the_input_channels(bit):
    def expected(parameters, x, found):
        follower = Follower(Grid(bit, True, False, (1,)), found)
        return in_numpy(parameters, x, lambda name, w: follower(name, w, follower.grid.qparams), same), follower

    config = dict(OBSERVERS, w_qscheme=dict(scheme(bit, True, True, False), ch_axis=1), a_qscheme='float')
    check(config, 'weight', expected)


def test_weights_with_scales_of_the_input_channels_and_a_learning_batch_norm():
    model = calibrate(quantized(network(), dict(w_qscheme=dict(bit=4, ch_axis=1), a_qscheme='float')))
    conv, norm = model.architecture[0], model.architecture[1]
    quantizer, x = conv.weight_fake_quant, images(4)
    factor = (norm.weight / (norm.running_var + norm.eps).sqrt()).detach().reshape(-1, 1, 1, 1)
    scale = quantizer.scale.reshape(1, -1, 1, 1)
    weight = (conv.weight * factor / scale).round().clamp(-8, 7) * scale / factor
    expected = nn.functional.batch_norm(
        nn.functional.conv2d(x, weight, padding=1), None, None, norm.weight, norm.bias, training=True, eps=norm.eps
    )
    model.train()
    model.set_quant_state(False, True, False, False)
    seen = []
    norm.register_forward_hook(lambda *args: seen.append(args[-1]))
    model(x)

    assert quantizer.scale.shape == (3,)
    torch.testing.assert_close(seen[0], expected, rtol=1e-4, atol=1e-4)


@bits
@matrix
def test_static_activations(bit, symmetric, channels, pot):
    def expected(parameters, x, found):
        follower = Follower(Grid(bit, symmetric, pot, (1,) if channels else None), found)
        ranges = {}

        def calibrating(name, values):
            ranges[name] = follower.grid.qparams(values)
            return values

        in_numpy(parameters, images().double().numpy(), same, calibrating)
        return in_numpy(parameters, x, same, lambda name, x: follower(name, x, lambda _: ranges[name])), follower

    config = dict(OBSERVERS, w_qscheme='float', a_qscheme=scheme(bit, symmetric, channels, pot))
    # Its scales are those of other data, in NumPy: not known to the last bit; but what is not quantized is not clipped.
    check(config, 'input', expected, counts=bit == 16)


@bits
@pytest.mark.parametrize('share', ['tensor', 'sample', 'token'])
@pytest.mark.parametrize('symmetric, pot', product((False, True), repeat=2))
def test_dynamic_activations(bit, symmetric, pot, share):
    """What shares a range at run time is never a channel, but a sample or a token."""

    def expected(parameters, x, found):
        follower = Follower(Grid(bit, symmetric, pot, None), found)

        def activation(name, values):
            axes = {'tensor': (), 'sample': (0,), 'token': tuple(range(values.ndim - 1))}[share]
            return follower(name, values, Grid(bit, symmetric, pot, axes).qparams)

        return in_numpy(parameters, x, same, activation), follower

    config = dict(
        OBSERVERS, w_qscheme='float', a_qscheme=scheme(bit, symmetric, False, pot),
        a_fake_quant=dict(type='mmrazor.DynamicFakeQuantize', share=share),
    )  # fmt: skip
    check(config, 'input', expected)


def test_the_numpy_network_is_the_network():
    module = network()
    x = images(4, seed=1)
    expected = in_numpy(parameters_of(module), x.double().numpy(), same, same)
    np.testing.assert_allclose(module(x).detach().numpy(), expected, rtol=1e-4, atol=1e-5)


DYNAMIC = dict(type='mmrazor.DynamicFakeQuantize')
MEANINGLESS = {
    'bits below 1': (dict(w_qscheme=dict(bit=0)), r'qconfig\.w_qscheme\.bit: got 0, allowed: integers 1 to 32'),
    'bits above 32': (dict(a_qscheme=dict(bit=33)), r'qconfig\.a_qscheme\.bit: got 33, allowed: integers 1 to 32'),
    'a fraction of a bit': (dict(w_qscheme=dict(bit=2.5)), r'qconfig\.w_qscheme\.bit: got 2\.5'),
    'one bit without the lowest level': (
        dict(w_qscheme=dict(bit=1, is_symmetric_range=True)), r'is_symmetric_range: .*one level would be left'),
    'a symmetric range of unsigned integers': (
        dict(w_qscheme=dict(is_signed=False, is_symmetric_range=True)), r'is_symmetric_range: .*not signed'),
    'a symmetric range of asymmetric, unsigned integers': (
        dict(a_qscheme=dict(is_symmetry=False, is_symmetric_range=True)), r'is_symmetric_range: .*not signed'),
    'dynamic weights': (dict(w_fake_quant=DYNAMIC), r'DynamicFakeQuantize is not for weights'),
    'dynamic per channel': (
        dict(a_fake_quant=DYNAMIC, a_qscheme=dict(is_per_channel=True)), r'is_per_channel: got True.*see share'),
    'clipped weights of PACT': (
        dict(w_fake_quant=dict(type='mmrazor.PACTFakeQuantize')), r'PACTFakeQuantize is not for weights'),
    'activations of DoReFa': (
        dict(a_fake_quant=dict(type='mmrazor.DoReFaFakeQuantize')), r'DoReFaFakeQuantize is not for activations'),
    'asymmetric thresholds': (
        dict(a_fake_quant=dict(type='mmrazor.TQTFakeQuantize'), a_qscheme=dict(is_symmetry=False)),
        r'is_symmetry: got False.*TQTFakeQuantize: True'),
    'channels of a weight that no backend runs': (
        dict(w_qscheme=dict(ch_axis=1)), r"w_qscheme\.ch_axis: got 1, allowed with quantizer\.backend='onnxruntime'"),
    'an integer bias without scales of its own': (
        dict(w_qscheme=dict(ch_axis=1)), r'w_qscheme\.ch_axis: got 1, allowed with quantizer\.quantize_bias'),
    'an observer per tensor with channels': (
        dict(w_observer=dict(type='mmrazor.MinMaxObserver', ch_axis=0)), r'ch_axis given twice'),
}  # fmt: skip


ELSEWHERE = {
    'channels of a weight that no backend runs': dict(backend='onnxruntime'),
    'an integer bias without scales of its own': dict(quantize_bias=True),
}


@pytest.mark.parametrize('name', MEANINGLESS)
def test_combinations_without_meaning_are_refused(name):
    config, match = MEANINGLESS[name]
    with pytest.raises(ValueError, match=match):
        CustomQuantizer(qconfig=config, **ELSEWHERE.get(name, {}))
