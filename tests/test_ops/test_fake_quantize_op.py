"""Fake quantization: the formula, against NumPy and torch's own ops, and its gradient."""

from __future__ import annotations

import copy

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from mmrazor_quant import ops
from mmrazor_quant.ops import reference

SIZES = {'eager': 1000, 'compiled': 2**15}


def in_numpy(x, scale, zero_point, low, high):
    """The formula once more, in float32 NumPy."""
    scale = np.float32(scale)
    q = np.rint(x * (np.float32(1) / scale)) + np.float32(zero_point)
    return (np.clip(q, low, high) - np.float32(zero_point)) * scale


def param(scale, zero_point):
    return torch.tensor([scale]), torch.tensor([zero_point], dtype=torch.int32)


def bits_of(x):
    return x.detach().view(torch.int32)


floats = st.floats(-1e6, 1e6, width=32)
scales = st.floats(np.float32(1e-3), np.float32(1e3), width=32)


@given(st.lists(floats, min_size=1, max_size=30), scales, st.integers(-8, 7))
@settings(max_examples=100, deadline=None)
def test_equals_numpy(values, scale, zero_point):
    x = np.array(values, dtype=np.float32)
    y = ops.fake_quantize(torch.from_numpy(x), *param(scale, zero_point), -8, 7)
    np.testing.assert_array_equal(y.numpy(), in_numpy(x, scale, zero_point, -8, 7))


@given(st.lists(floats, min_size=2, max_size=30), scales, st.integers(0, 255))
@settings(max_examples=100, deadline=None)
def test_properties(values, scale, zero_point):
    x = torch.tensor(sorted(values))
    s, z = param(scale, zero_point)
    y = ops.fake_quantize(x, s, z, 0, 255)
    assert torch.equal(ops.fake_quantize(y, s, z, 0, 255), y), 'idempotent'
    assert (y.diff() >= 0).all(), 'monotone'
    q = ops.quantize(x, s, z, 0, 255)
    assert q.min() >= 0 and q.max() <= 255
    assert torch.equal(ops.dequantize(q, s, z), y), 'on the grid'
    inside = (x >= -zero_point * s) & (x <= (255 - zero_point) * s)
    assert ((y - x)[inside].abs() <= s / 2 * (1 + 1e-5) + 1e-6 * x[inside].abs()).all(), 'half a step'
    zero = ops.fake_quantize(torch.zeros(1), s, z, 0, 255)
    assert zero.item() == 0


def native(x, scale, zero_point, low, high, ch_axis):
    if ch_axis == -1:
        return torch.fake_quantize_per_tensor_affine(x, scale, zero_point, low, high)
    return torch.fake_quantize_per_channel_affine(x, scale, zero_point, ch_axis, low, high)


def assert_equal_to_native(x, scale, zero_point, low, high, ch_axis=-1):
    """Forward and backward have the same bits as torch's op."""
    ours, theirs = (x.detach().clone().requires_grad_() for _ in range(2))
    y, expected = ops.fake_quantize(ours, scale, zero_point, low, high, ch_axis), native(
        theirs, scale, zero_point, low, high, ch_axis)  # fmt: skip
    assert torch.equal(bits_of(y), bits_of(expected))
    assert y.stride() == expected.stride()
    grad = torch.randn_like(y)
    y.backward(grad)
    expected.backward(grad)
    assert torch.equal(bits_of(ours.grad), bits_of(theirs.grad))


def tricky(n: int, scale: float) -> torch.Tensor:
    """Ties, values around the clip, large and small magnitudes, both zeros."""
    ties = (torch.arange(n // 4) - n // 8 + 0.5) * scale
    powers = torch.randn(n // 4) * torch.exp2(torch.randint(-40, 40, (n // 4,)).float())
    around = torch.randn(n // 4) * 300 * scale
    rest = torch.randn(n - 3 * (n // 4))
    rest[:2] = torch.tensor([0.0, -0.0])
    return torch.cat([ties, powers, around, rest])


@pytest.mark.parametrize('path', SIZES)
@pytest.mark.parametrize('low, high', [(-128, 127), (0, 15), (-(2**15), 2**15 - 1), (0, 2**24 - 1)])
@pytest.mark.parametrize('scale, zero', [(0.0137, 3), (0.03125, 0), (1.7, 1)])
def test_equals_native_per_tensor(compile_at_once, path, low, high, scale, zero):
    assert_equal_to_native(tricky(SIZES[path], scale), *param(scale, zero), low, high)


def test_equals_native_on_millions_of_values(compile_at_once):
    assert_equal_to_native(torch.randn(2**21) * 3, *param(0.0137, 3), -128, 127)
    assert_equal_to_native(torch.randn(2**20) * 1e10, *param(0.0137, 3), -128, 127)


@pytest.mark.parametrize(
    'shape, ch_axis, channels_last',
    [((16, 32, 8, 9), 0, False), ((16, 32, 8, 9), 1, False), ((16, 32, 8, 9), 0, True), ((16, 32, 8, 9), 1, True),
     ((64, 64), 0, False), ((512, 64), 1, False), ((2, 20000), 0, False), ((1, 20000), 1, False),
     ((20000, 1), 0, False), ((5, 7, 9), 1, False)],
)  # fmt: skip
def test_equals_native_per_channel(compile_at_once, shape, ch_axis, channels_last):
    x = torch.randn(shape)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    n = shape[ch_axis]
    scale, zero_point = torch.rand(n) * 0.05 + 0.01, torch.randint(-5, 5, (n,), dtype=torch.int32)
    assert_equal_to_native(x, scale, zero_point, -128, 127, ch_axis)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_types_are_computed_in_float32(compile_at_once, dtype):
    x = (torch.randn(2**15) * 3).to(dtype)
    y = ops.fake_quantize(x, *param(0.0137, 3), -128, 127)
    assert y.dtype == dtype
    assert torch.equal(y, ops.fake_quantize(x.float(), *param(0.0137, 3), -128, 127).to(dtype))


@pytest.mark.parametrize('path', SIZES)
def test_wide_ranges_are_as_good_as_float32(compile_at_once, path):
    x = torch.randn(SIZES[path])
    scale, zero_point = ops.qparams_from_range(x.min(), x.max(), 0, 2**32 - 1, symmetric=False)
    y = ops.fake_quantize(x, scale, zero_point, 0, 2**32 - 1)
    assert (y - x).abs().max() <= 2**-23 * x.abs().max()


def test_float64_stays_float64():
    x = torch.randn(100, dtype=torch.float64)
    scale, zero_point = param(0.5, 0)
    y = ops.fake_quantize(x, scale, zero_point, -128, 127)
    assert y.dtype == torch.float64
    assert torch.equal(y, torch.round(x * 2) / 2)


@pytest.mark.parametrize('path', SIZES)
def test_memory_formats(compile_at_once, path):
    n = 2 if path == 'eager' else 40
    x = torch.randn(n, 8, 10, 12)
    expected = ops.fake_quantize(x, *param(0.1, 0), -8, 7)
    last = ops.fake_quantize(x.to(memory_format=torch.channels_last), *param(0.1, 0), -8, 7)
    assert torch.equal(last, expected) and last.is_contiguous(memory_format=torch.channels_last)
    permuted = ops.fake_quantize(x.permute(3, 0, 1, 2), *param(0.1, 0), -8, 7)
    assert torch.equal(permuted, expected.permute(3, 0, 1, 2))
    gaps = ops.fake_quantize(x[:, ::2], *param(0.1, 0), -8, 7)
    assert torch.equal(gaps, expected[:, ::2])
    expanded = ops.fake_quantize(x[:1].expand(n, 8, 10, 12), *param(0.1, 0), -8, 7)
    assert torch.equal(expanded, expected[:1].expand(n, 8, 10, 12))


@pytest.mark.parametrize('path', SIZES)
def test_gradient_of_other_strides(compile_at_once, path):
    x = torch.randn(SIZES[path] // 8, 8, requires_grad=True)
    ops.fake_quantize(x, *param(0.1, 0), -8, 7).sum().backward()  # an expanded scalar
    inside = (torch.round(x * 10) >= -8) & (torch.round(x * 10) <= 7)
    assert torch.equal(x.grad, inside.float())
    x.grad = None
    weight = torch.randn(8, SIZES[path] // 8)
    (ops.fake_quantize(x, *param(0.1, 0), -8, 7) * weight.t()).sum().backward()
    assert torch.equal(x.grad, inside * weight.t())


@pytest.mark.parametrize('path', SIZES)
def test_nan_and_infinity(compile_at_once, path):
    x = torch.zeros(SIZES[path])
    x[:3] = torch.tensor([float('nan'), float('inf'), float('-inf')])
    x.requires_grad_()
    y = ops.fake_quantize(x, *param(0.5, 1), -8, 7)
    assert y[0].isnan() and y[1] == 3.0 and y[2] == -4.5
    y[3:].sum().backward()
    assert x.grad[:3].tolist() == [0, 0, 0] and (x.grad[3:] == 1).all()


def test_gradient_is_that_of_the_formula_with_rounding_passed_through():
    x = torch.randn(200, dtype=torch.float64, requires_grad=True)
    scale, zero_point = param(0.25, 2)
    ops.fake_quantize(x, scale, zero_point, -8, 7).pow(2).sum().backward()
    ours, x.grad = x.grad, None
    s = scale.double()
    u = x / s
    q = (u + (u.round() - u).detach() + 2).clamp(-8, 7)
    ((q - 2) * s).pow(2).sum().backward()
    torch.testing.assert_close(ours, x.grad)


def test_second_derivative():
    x = torch.randn(50, dtype=torch.float64, requires_grad=True)
    y = ops.fake_quantize(x, *param(0.25, 0), -8, 7)
    (first,) = torch.autograd.grad((y**2).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    inside = (y.abs() > 0) | (x.abs() < 0.125)
    assert torch.equal(second, 2.0 * (inside & (x > -2.1) & (x < 1.85)))


@pytest.mark.parametrize('path', SIZES)
def test_modes(compile_at_once, path):
    """Gradient modes, autocast and in-place changes of the result make no difference."""
    args = (*param(0.1, 0), -8, 7)
    x = torch.randn(SIZES[path])
    with ops.eager_mode():
        expected = ops.fake_quantize(x, *args)
    with torch.no_grad():
        assert torch.equal(ops.fake_quantize(x, *args), expected)
    with torch.inference_mode():
        assert torch.equal(ops.fake_quantize(x, *args), expected)
        assert torch.equal(ops.fake_quantize(x.clone(), *args), expected)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        assert torch.equal(ops.fake_quantize(x, *args), expected)
    for leaf in (x, torch.nn.Parameter(x.clone())):
        y = ops.fake_quantize(leaf, *args).relu_()
        assert torch.equal(y, expected.relu())
    y.sum().backward()
    assert leaf.grad.count_nonzero() > 0


def test_meta_device():
    y = ops.fake_quantize(torch.empty(2**15, device='meta'), *(p.to('meta') for p in param(0.1, 0)), -8, 7)
    assert y.shape == (2**15,) and y.device.type == 'meta'


def test_jit_trace_and_export_see_the_formula():
    class Net(torch.nn.Module):
        def forward(self, x):
            return ops.fake_quantize(x, torch.tensor([0.1]), torch.tensor([0]), -8, 7)

    x, other = torch.randn(2**15), torch.randn(2**15)
    expected = Net()(other)
    with torch.no_grad():
        assert torch.equal(torch.jit.trace(Net(), x)(other), expected)
        assert torch.equal(torch.export.export(Net(), (x,)).module()(other), expected)


def test_parameters_that_do_not_fit_are_refused():
    for n in (100, 2**14):
        with pytest.raises(ValueError, match=r'ch_axis=1.*one per channel'):
            ops.fake_quantize(torch.zeros(n, 4), torch.ones(3), torch.zeros(3, dtype=torch.int32), -8, 7, 1)


@pytest.mark.parametrize('variable, works', [('1', True), ('0', True)])
def test_environment_variable(monkeypatch, variable, works):
    from mmrazor_quant.ops import compiled

    monkeypatch.setenv(compiled.EAGER_VARIABLE, variable)
    assert compiled._Switch().on == (variable == '0')


def test_falls_back_to_eager_and_says_so_once(monkeypatch, caplog):
    from mmrazor_quant.ops import compiled

    def broken(*args):
        raise RuntimeError('no C++ compiler')

    said = []
    monkeypatch.setattr(compiled.switch, 'on', True)
    monkeypatch.setattr(compiled.switch, 'patience', 0)
    monkeypatch.setattr(compiled, '_compile', broken)
    monkeypatch.setattr(compiled, 'print_log', lambda message, **kwargs: said.append(message))
    x = torch.randn(2**15, requires_grad=True)
    y = ops.fake_quantize(x, *param(0.1, 0), -8, 7)
    y.sum().backward()
    with ops.eager_mode():
        assert torch.equal(y, ops.fake_quantize(x, *param(0.1, 0), -8, 7))
    assert len(said) == 1 and 'no C++ compiler' in said[0]
    assert not compiled.switch.on


def test_compiles_only_once_it_is_worthwhile(monkeypatch):
    from mmrazor_quant.ops import compiled

    calls = []
    monkeypatch.setattr(compiled.switch, 'on', True)
    monkeypatch.setattr(compiled.switch, 'done', {})
    monkeypatch.setattr(compiled.switch, 'patience', 2**20)
    monkeypatch.setattr(compiled, '_compile', lambda function, *key: calls.append(key) or function)
    x = torch.randn(2**15)
    for _ in range(10):
        ops.fake_quantize(x, *param(0.1, 0), -8, 7)
    assert len(calls) == 7  # 3 calls of 2^15 elements and 8 operations, and what a call costs, come first


def test_bounds_are_shared_between_modes():
    with torch.inference_mode():
        low, high = reference.bounds(-3, 3, torch.float32, torch.device('cpu'))
    assert not low.is_inference() and (low.item(), high.item()) == (-3, 3)
    assert copy.deepcopy(low) == low
