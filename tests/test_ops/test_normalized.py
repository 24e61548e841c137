"""Batch norm, activation and fake quantization at once against torch's operations one by one in float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmrazor_quant import ops
from mmrazor_quant.ops import compiled, normalized

SHAPE = (4, 8, 32, 32)
ENDS = {'relu': (0.0, math.inf), 'relu6': (0.0, 6.0), 'none': (-math.inf, math.inf)}
MOMENTUM, EPS = 0.3, 1e-3


def parameters() -> tuple[Tensor, ...]:
    """Weight, bias, running mean and variance of a batch norm; the weights of both signs."""
    return torch.randn(8), torch.randn(8), torch.randn(8), torch.rand(8) + 0.5


def observed(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    return ops.qparams_from_range(low.reshape(1), high.reshape(1), 0, 15, symmetric=False)


QUANTIZATIONS = {
    'learned': ops.Quantization(torch.tensor([0.21]), torch.tensor([0]), 0, 15, grad_factor=0.5),
    'learned, zero point': ops.Quantization(torch.tensor([0.21]), torch.tensor([5]), 0, 15, grad_factor=0.5),
    'learned power of two': ops.Quantization(torch.tensor([0.23]), torch.tensor([0]), -8, 7, 0.5, is_pot_scale=True),
    'fixed': ops.Quantization(torch.tensor([0.13]), torch.tensor([40]), 0, 255),
    'observed': ops.Quantization(torch.ones(1), torch.zeros(1, dtype=torch.int32), 0, 15, from_range=observed),
}


def straight_through(x: Tensor, value: Tensor) -> Tensor:
    return x + (value - x).detach()


def exact_quantized(y: Tensor, scale: Tensor, q: ops.Quantization) -> Tensor:
    """In float64; ``scale`` is the one in use."""
    zero_point = q.zero_point
    if q.from_range is not None:
        scale, zero_point = (v.double() for v in q.from_range(y.detach().amin().float(), y.detach().amax().float()))
    u = y / scale
    return (torch.clamp(straight_through(u, u.round()) + zero_point, q.quant_min, q.quant_max) - zero_point) * scale


def exact(x, other, norm, ends, q, scale):
    """The operations one by one; returns the quantized result and the plain one."""
    weight, bias, running_mean, running_var = norm
    y = F.batch_norm(x, running_mean, running_var, weight, bias, training=True, momentum=MOMENTUM, eps=EPS)
    y = y if other is None else y + other
    # As in torch's ReLU, no gradient at the ends.
    y = F.hardtanh(y, *ends) if math.isfinite(ends[1]) else F.relu(y) if ends[0] == 0 else y
    return exact_quantized(y, scale, q), y


def assert_near(found: Tensor, expected: Tensor, what: str, tolerance: float = 2e-3) -> None:
    """Equal up to rounding, and to the few values that rounding puts on the other side of a tie."""
    error = (found.double() - expected).norm() / expected.norm()
    assert error < tolerance, f'{what}: relative error {error}'


def check(has_other: bool, has_plain: bool, ends: tuple[float, float], q: ops.Quantization) -> None:
    torch.manual_seed(0)
    x, norm = torch.randn(SHAPE, requires_grad=True), parameters()
    other = torch.randn(SHAPE, requires_grad=True) if has_other else None
    grads = torch.randn(SHAPE), torch.randn(SHAPE)
    learned = q.grad_factor is not None
    scale = q.scale.clone().requires_grad_(learned)
    leaves = [t for t in (x, other, norm[0].requires_grad_(), norm[1].requires_grad_()) if t is not None]
    exact_leaves = [t.detach().double().requires_grad_() for t in leaves]
    exact_scale = ops.effective_scale(q.scale, q.is_pot_scale).double().requires_grad_(learned)
    exact_running = [t.double() for t in norm[2:]]

    given = ops.BatchNorm(*norm, MOMENTUM, EPS)
    quantization = ops.Quantization(scale, q.zero_point, q.quant_min, q.quant_max, q.grad_factor, q.is_pot_scale,
                                    q.from_range)  # fmt: skip
    assert normalized.usable(x, other, quantization)
    result, plain = ops.fake_quantize_normalized(x, other, given, ends, quantization, has_plain)
    ((result * grads[0]).sum() + ((plain * grads[1]).sum() if has_plain else 0.0)).backward()

    exact_x, *exact_other, weight, bias = exact_leaves
    expected, expected_plain = exact(
        exact_x, exact_other[0] if has_other else None, (weight, bias, *exact_running), ends, q, exact_scale
    )
    wanted = (expected * grads[0]).sum() + ((expected_plain * grads[1]).sum() if has_plain else 0.0)
    wanted.backward()
    assert_near(result, expected, 'result')
    assert (plain is not None) == has_plain
    if has_plain:
        assert_near(plain, expected_plain, 'plain result', 1e-6)
    for name, found, truth in zip(('running mean', 'running variance'), norm[2:], exact_running):
        assert_near(found, truth, name, 1e-6)
    for index, (found, truth) in enumerate(zip(leaves, exact_leaves)):
        assert found.grad.shape == found.shape
        assert_near(found.grad, truth.grad, f'gradient {index}')
    if learned:
        ratio = exact_scale.detach() / q.scale
        assert_near(scale.grad, exact_scale.grad * ratio * q.grad_factor, 'gradient of the scale')


@pytest.mark.parametrize('has_plain', [False, True])
@pytest.mark.parametrize('has_other', [False, True])
@pytest.mark.parametrize('ends', ENDS.values(), ids=ENDS)
@pytest.mark.parametrize('quantization', QUANTIZATIONS.values(), ids=QUANTIZATIONS)
def test_values_statistics_and_gradients(compile_at_once, has_other, has_plain, ends, quantization):
    check(has_other, has_plain, ends, quantization)


@pytest.mark.parametrize('has_other, has_plain', [(False, False), (True, True)])
@pytest.mark.parametrize('quantization', QUANTIZATIONS.values(), ids=QUANTIZATIONS)
def test_where_compiling_turns_out_not_to_work(compile_at_once, monkeypatch, has_other, has_plain, quantization):
    monkeypatch.setattr(compiled, 'call', lambda *args: None)
    check(has_other, has_plain, ENDS['relu'], quantization)


def test_digits_survive_far_from_zero(compile_at_once):
    """The running mean is near the batch's after some steps, wherever that is."""
    torch.manual_seed(0)
    x = torch.randn(SHAPE) + 3000.0
    exact_mean, exact_var = x.double().mean((0, 2, 3)), x.double().var((0, 2, 3), unbiased=True)
    mean, var = torch.full((8,), 3000.5), torch.ones(8)
    given = ops.BatchNorm(torch.ones(8), torch.zeros(8), mean, var, 1.0, EPS)
    ops.fake_quantize_normalized(x.requires_grad_(), None, given, ENDS['none'], QUANTIZATIONS['fixed'])
    assert torch.allclose(mean.double(), exact_mean, rtol=1e-7, atol=0)
    assert torch.allclose(var.double(), exact_var, rtol=1e-4, atol=0)


def test_only_plain_result_used(compile_at_once):
    torch.manual_seed(0)
    x, norm = torch.randn(SHAPE, requires_grad=True), parameters()
    given = ops.BatchNorm(*norm, MOMENTUM, EPS)
    _, plain = ops.fake_quantize_normalized(x, None, given, ENDS['relu'], QUANTIZATIONS['fixed'], has_plain=True)
    grad = torch.randn(SHAPE)
    plain.backward(grad)
    again = x.detach().clone().requires_grad_()
    F.relu(F.batch_norm(again, None, None, *norm[:2], training=True, eps=EPS)).backward(grad)
    assert torch.allclose(x.grad, again.grad, rtol=1e-4, atol=1e-5)


def test_gradient_of_an_expanded_tensor(compile_at_once):
    """What comes back from a mean over the image is one value, expanded."""
    torch.manual_seed(0)
    x, norm = torch.randn(SHAPE, requires_grad=True), parameters()
    given = ops.BatchNorm(*norm, MOMENTUM, EPS)
    results = [ops.fake_quantize_normalized(x, None, given, ENDS['relu'], QUANTIZATIONS['fixed'])[0] for _ in range(2)]
    found = torch.autograd.grad(results[0].mean((2, 3)).sum(), x)[0]
    expected = torch.autograd.grad(results[1], x, torch.full(SHAPE, 1 / 1024))[0]
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-8)


def test_gradient_of_gradient_is_refused(compile_at_once):
    x, norm = torch.randn(SHAPE, requires_grad=True), parameters()
    given = ops.BatchNorm(*norm, MOMENTUM, EPS)
    result, _ = ops.fake_quantize_normalized(x, None, given, ENDS['relu'], QUANTIZATIONS['fixed'])
    (grad,) = torch.autograd.grad(result.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match='once_differentiable'):
        grad.sum().backward()


NOT_USABLE = {
    'few elements': (torch.randn(2, 8, 8, 8), None, {}),
    'channels last': (torch.randn(SHAPE).to(memory_format=torch.channels_last), None, {}),
    'half': (torch.randn(SHAPE, dtype=torch.bfloat16), None, {}),
    'matrix': (torch.randn(2**10, 2**6), None, {}),
    'one value per channel': (torch.randn(1, 2**15, 1, 1), None, {}),
    'broadcast addition': (torch.randn(SHAPE), torch.randn(8, 1, 1), {}),
    'many bits': (torch.randn(SHAPE), None, {'quant_min': -(2**31), 'quant_max': 2**31 - 1}),
    'per channel': (torch.randn(SHAPE), None, {'scale': torch.ones(8), 'zero_point': torch.zeros(8)}),
}


@pytest.mark.parametrize('x, other, fields', NOT_USABLE.values(), ids=NOT_USABLE)
def test_not_usable(compile_at_once, x, other, fields):
    q = {'scale': torch.ones(1), 'zero_point': torch.zeros(1), 'quant_min': 0, 'quant_max': 15, **fields}
    assert not normalized.usable(x.requires_grad_(), other, ops.Quantization(**q))


def test_usable_only_in_training(compile_at_once):
    x, q = torch.randn(SHAPE), QUANTIZATIONS['fixed']
    assert not normalized.usable(x, None, q)
    assert normalized.usable(x.requires_grad_(), None, q)
    with torch.no_grad():
        assert not normalized.usable(x, None, q)
    with torch.autocast('cpu'):
        assert not normalized.usable(x, None, q)
    with ops.eager_mode():
        assert not normalized.usable(x, None, q)
