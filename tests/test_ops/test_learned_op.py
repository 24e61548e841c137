"""Gradients of the learned operations, against autograd of the formulas of the papers in float64."""

from __future__ import annotations

import math

import pytest
import torch

from mmrazor_quant import ops
from mmrazor_quant.ops import MIN_SCALE, chunked, elementwise, learned_reference, reference

SMALL = {
    'one scale': ((4, 6, 5, 7), -1),
    'first': ((6, 40), 0),
    'last': ((40, 6), 1),
    'middle': ((4, 6, 5, 7), 1),
    'one dimension': ((12,), 0),
}
LARGE = {
    'one scale': ((9, 6, 30, 50), -1),
    'first': ((6, 15000), 0),
    'last': ((15000, 6), 1),
    'middle': ((9, 6, 30, 50), 1),
}
RANGES = {'signed': (-8, 7), 'unsigned': (0, 15)}


def passed(x: torch.Tensor) -> torch.Tensor:
    """Rounding, straight through."""
    return x + (x.round() - x).detach()


def positive(scale, is_pot=False):
    """What a parameter stands for: at least the smallest scale, straight through; a power of two if asked for."""
    scale = scale + (scale.clamp(min=MIN_SCALE) - scale).detach()
    if not is_pot:
        return scale
    log2 = torch.log2(scale)
    return torch.exp2(passed(log2))


def step_formula(x, scale, zero_point, low, high, is_pot=False):
    """LSQ."""
    s = positive(scale, is_pot)
    return (torch.clamp(passed(x / s) + zero_point, low, high) - zero_point) * s


def offset_formula(x, scale, offset, low, high, is_pot=False):
    """LSQ+."""
    s = positive(scale, is_pot)
    return torch.clamp(passed((x - offset) / s), low, high) * s + offset


def clip_formula(x, lower, upper, scale, zero_point, low, high):
    """PACT: what is not clipped keeps its gradient, what is clipped is the end of the range."""
    q = torch.round(x / scale) + zero_point
    y = torch.where(q < low, lower, torch.where(q > high, upper, x))
    return y + ((q.clamp(low, high) - zero_point) * scale - y).detach()


def soft_formula(x, lower, upper, alpha, scale, zero_point, low, high):
    """DSQ, eq. 3 to 7: phi(x) = s tanh(k (x - m)) on the interval of length delta around m."""
    q = torch.round(x / scale) + zero_point
    interval = torch.floor(x / scale)
    delta, middle = scale, (interval + 0.5) * scale
    k = torch.log(2 / alpha - 1) / delta
    phi = torch.tanh(k * (x - middle)) / torch.tanh(0.5 * k * delta)
    y = delta * (interval + (phi + 1) / 2)
    y = torch.where(q < low, lower, torch.where(q > high, upper, y))
    return y + ((q.clamp(low, high) - zero_point) * scale - y).detach()


def shaped(values: torch.Tensor, x: torch.Tensor, axis: int) -> torch.Tensor:
    """Channels where they are in x."""
    return values if axis == -1 else values.reshape([-1 if d == axis else 1 for d in range(x.dim())])


def params_of(kind: str, channels: int, low: int, high: int) -> list[torch.Tensor]:
    """Parameters, the learned ones first: all floats, the zero point whole."""
    scale = 0.05 + 0.1 * torch.rand(channels)
    zero = torch.randint(low + 1, high, (channels,)).float() if low < 0 else torch.full((channels,), 3.0)
    ends = [(low - zero) * scale, (high - zero) * scale]
    return {
        'step': [scale, zero],
        'offset': [scale, torch.randn(channels)],
        'clip': [*ends, scale, zero],
        'soft': [*ends, 0.1 + 0.5 * torch.rand(channels), scale, zero],
    }[kind]


OPERATIONS = {
    'step': (ops.fake_quantize_learned, step_formula, 1, learned_reference.step_terms),
    'offset': (ops.fake_quantize_offset, offset_formula, 2, learned_reference.offset_terms),
    'clip': (ops.fake_quantize_clip, clip_formula, 2, learned_reference.clip_terms),
    'soft': (ops.fake_quantize_soft, soft_formula, 3, learned_reference.soft_terms),
}


def away_from_ties(shape, scale, shift, low, high) -> torch.Tensor:
    """Values inside and beyond the range, none so close to a tie that float32 could round it the other way."""
    steps = torch.randint(low - 6, high + 7, shape) + (torch.rand(shape) - 0.5) * 0.9
    return (steps - shift) * scale


def assert_close(found: torch.Tensor, expected: torch.Tensor, size: torch.Tensor | float, dtype, what: str) -> None:
    """Equal up to rounding of terms of the given size."""
    unit = torch.finfo(dtype).eps
    difference = (found.double() - expected).abs()
    assert (difference <= 8 * unit * size).all(), f'{what}: {difference.max()} of {expected.abs().max()}'


def check(kind, shape, axis, bounds=(-8, 7), arrange=None, dtype=torch.float32, rest=(), formula_rest=()):
    """Forward and all gradients."""
    function, formula, learned_count, _ = OPERATIONS[kind]
    low, high = bounds
    channels = 1 if axis == -1 else shape[axis]
    raw = params_of(kind, channels, low, high)
    plain = torch.empty(shape)
    scale = raw[{'step': 0, 'offset': 0, 'clip': 2, 'soft': 3}[kind]]
    step = ops.effective_scale(scale, *formula_rest)
    shift = -raw[1] / step if kind == 'offset' else raw[-1]
    x = away_from_ties(shape, shaped(step, plain, axis), shaped(shift, plain, axis), low, high).to(dtype)
    x = x if arrange is None else arrange(x)
    x.requires_grad_()
    params = [p.clone().requires_grad_(i < learned_count) for i, p in enumerate(raw)]
    grad = torch.randn_like(x)

    y = function(x, *params, low, high, axis, *rest)
    y.backward(grad)

    exact_x = x.detach().double().requires_grad_()
    exact = [p.detach().double().requires_grad_(i < learned_count) for i, p in enumerate(raw)]
    expected = formula(exact_x, *(shaped(p, x, axis) for p in exact), low, high, *formula_rest)
    expected.backward(grad.double())
    largest = expected.abs().max()
    assert y.dtype == x.dtype and y.shape == x.shape
    assert_close(y, expected.detach(), largest, dtype, 'result')
    # The slope of the soft staircase is steep, and x / s is as exact as its integers are large.
    steep = 16 if kind == 'soft' else 1
    assert_close(x.grad, exact_x.grad, grad.abs().max() * steep, dtype, 'gradient of x')
    sharing = x.numel() / channels
    # Sums: as exact as float32 makes a sum of so many terms, each of up to the integers' size.
    size = grad.abs().max() * max(abs(low), high, 1) * 4 * math.sqrt(sharing) * math.log2(max(sharing, 2))
    for i in range(learned_count):
        assert params[i].grad.shape == params[i].shape and params[i].grad.dtype == params[i].dtype
        wanted = exact[i].grad * (rest[0] if rest else 1)
        assert_close(params[i].grad, wanted, size, torch.float32, f'gradient of parameter {i}')
    return x, y


@pytest.mark.parametrize('bounds', RANGES.values(), ids=RANGES)
@pytest.mark.parametrize('layout', SMALL)
@pytest.mark.parametrize('kind', OPERATIONS)
def test_small_tensors(kind, layout, bounds):
    check(kind, *SMALL[layout], bounds)


@pytest.fixture
def called(monkeypatch):
    """Which way the gradients took."""
    found = []

    def spy(module, name):
        function = getattr(module, name)

        def call(*args, **kwargs):
            result = function(*args, **kwargs)
            if result is not None and (name != 'run' or kwargs.get('has_terms')):
                found.append(name)
            return result

        monkeypatch.setattr(module, name, call)

    spy(learned_reference, 'reduced')
    spy(chunked, 'step')
    spy(elementwise, 'run')
    return found


@pytest.mark.parametrize('layout', LARGE)
@pytest.mark.parametrize('kind', OPERATIONS)
def test_large_tensors_in_eager(kind, layout, called):
    with ops.eager_mode():
        check(kind, *LARGE[layout])
    assert called == ['step' if (kind, layout) == ('step', 'one scale') else 'reduced']


def test_large_tensors_in_pieces_and_whole_are_the_same(monkeypatch):
    x, g = torch.randn(2, 2**17 + 77)
    grid = reference.make_grid(x, torch.tensor([0.1]), torch.tensor([2]), -8, 7)
    assert chunked.usable([g, x], grid)
    inner, of_scale = chunked.step(g, x, grid)
    whole, of_scale_whole = learned_reference.reduced(learned_reference.step_terms, g, x, grid, -1)
    assert torch.equal(inner, whole)
    torch.testing.assert_close(of_scale, of_scale_whole, rtol=1e-4, atol=1e-3)
    assert torch.equal(chunked.forward(x, grid), reference.forward_formula(x, *grid))


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('strange', [float('nan'), float('inf'), None])
@pytest.mark.parametrize('which', ['value', 'gradient'])
def test_what_is_not_finite_is_the_same_in_pieces(which, strange, dtype):
    x, g = torch.randn(2, 2**17 + 77, dtype=dtype)
    if strange is not None:
        (x if which == 'value' else g)[77:99] = strange
    grid = reference.make_grid(x, torch.tensor([0.1]), torch.tensor([2]), -8, 7)
    inner, of_scale = chunked.step(g, x, grid)
    whole, of_scale_whole = learned_reference.reduced(learned_reference.step_terms, g, x, grid, -1)
    torch.testing.assert_close(inner, whole, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(of_scale, of_scale_whole, rtol=1e-3, atol=1e-2, equal_nan=True)


@pytest.mark.parametrize(
    'kind, layout',
    [('step', layout) for layout in LARGE]
    + [(kind, layout) for kind in ('offset', 'clip', 'soft') for layout in ('one scale', 'middle')],
)
def test_large_tensors_compiled(compile_at_once, kind, layout, called):
    check(kind, *LARGE[layout])
    assert called == ['run']


ARRANGEMENTS = {
    'channels last': lambda x: x.contiguous(memory_format=torch.channels_last),
    'permuted': lambda x: x.permute(1, 0, 2, 3).contiguous().permute(1, 0, 2, 3),
    'with gaps': lambda x: torch.stack([x, x], -1)[..., 0],
    'expanded': lambda x: x[:, :, :, :1].expand(x.shape),
}


@pytest.mark.parametrize('axis', [-1, 0, 1, 3])
@pytest.mark.parametrize('arrangement', ARRANGEMENTS)
@pytest.mark.parametrize('kind', OPERATIONS)
def test_memory_formats(kind, arrangement, axis):
    x, y = check(kind, (4, 6, 5, 7), axis, arrange=ARRANGEMENTS[arrangement])
    if arrangement in ('channels last', 'permuted'):
        assert y.stride() == x.stride() == x.grad.stride()


@pytest.mark.parametrize('arrangement', ARRANGEMENTS)
def test_memory_formats_of_large_tensors(arrangement):
    with ops.eager_mode():
        check('step', (9, 6, 30, 50), -1, arrange=ARRANGEMENTS[arrangement])


@pytest.mark.parametrize('axis', [-1, 1])
@pytest.mark.parametrize('arrangement', ARRANGEMENTS)
def test_memory_formats_compiled(compile_at_once, arrangement, axis, called):
    check('step', (9, 6, 30, 50), axis, arrange=ARRANGEMENTS[arrangement])
    dense = arrangement in ('channels last', 'permuted')
    assert called == ['run' if dense else 'reduced']


@pytest.mark.parametrize('layout', ['one scale', 'middle'])
@pytest.mark.parametrize('kind', ['step', 'offset'])
@pytest.mark.parametrize('is_pot', [False, True])
def test_grad_factor_and_powers_of_two(kind, layout, is_pot):
    check(kind, *SMALL[layout], rest=(0.25, is_pot), formula_rest=(is_pot,))


@pytest.mark.parametrize('size', ['small', 'large'])
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('kind', OPERATIONS)
def test_half_types(kind, dtype, size):
    """The parameters are float32, and so are their gradients."""
    function, formula, learned_count, terms = OPERATIONS[kind]
    shape = (50, 7) if size == 'small' else (700, 100)
    params = [p.requires_grad_(i < learned_count) for i, p in enumerate(params_of(kind, 1, -8, 7))]
    x = torch.randn(shape).to(dtype).requires_grad_()
    grad = torch.randn(shape).to(dtype)
    with ops.eager_mode():
        y = function(x, *params, -8, 7)
        y.backward(grad)
        same = [p.detach().clone().requires_grad_(p.requires_grad) for p in params]
        as_float = x.detach().float().requires_grad_()
        expected = function(as_float, *same, -8, 7)
        expected.backward(grad.float())
    assert y.dtype == x.grad.dtype == dtype
    assert torch.equal(y, expected.to(dtype))
    torch.testing.assert_close(x.grad, as_float.grad.to(dtype))
    for found, wanted in zip(params[:learned_count], same):
        assert found.grad.dtype == torch.float32
        # The gradient of the input may be rounded before it is summed.
        torch.testing.assert_close(found.grad, wanted.grad, rtol=0.02, atol=0.02 * math.sqrt(x.numel()))


@pytest.mark.parametrize('scale', [0.0, -0.5])
@pytest.mark.parametrize('is_pot', [False, True])
@pytest.mark.parametrize('kind', ['step', 'offset'])
def test_scale_that_an_optimizer_made_zero_or_negative(kind, is_pot, scale):
    function, formula, *_ = OPERATIONS[kind]
    x = torch.tensor([-3.0, -1e-3, 0.0, 0.5, 2.0], requires_grad=True)
    s, shift = torch.tensor([scale], requires_grad=True), torch.zeros(1)
    y = function(x, s, shift, -8, 7, -1, 1.0, is_pot)
    y.sum().backward()
    assert torch.isfinite(y).all() and y.abs().max() < 1e-30
    assert x.grad.tolist() == [0, 0, 1, 0, 0]
    assert s.grad.item() == pytest.approx(-8 - 8 + 7 + 7)


def test_scale_that_an_optimizer_made_zero_on_large_tensors():
    x, s = torch.full((2**17,), 100.0), torch.zeros(1, requires_grad=True)
    with ops.eager_mode():
        ops.fake_quantize_learned(x, s, torch.zeros(1), -8, 7).mean().backward()
    assert s.grad.item() == pytest.approx(7)


@pytest.mark.parametrize('size', [100, 2**17])
def test_a_negative_scale_grows_again(size):
    x, s = torch.rand(size) + 0.5, torch.tensor([-0.01], requires_grad=True)
    optimizer = torch.optim.SGD([s], 0.002)
    with ops.eager_mode():
        for _ in range(50):
            optimizer.zero_grad()
            y = ops.fake_quantize_learned(x, s, torch.zeros(1), 0, 15)
            (y - x).pow(2).mean().backward()
            optimizer.step()
    assert s > 0 and (y - x).pow(2).mean() < 0.01 * x.pow(2).mean()


@pytest.mark.parametrize('size', [500, 2**17])
@pytest.mark.parametrize('bit', [8, 16, 20, 24, 25, 32])
def test_many_bits(bit, size):
    """Inside, the terms d - u are at most 1/2, and x / s is exact for a power of two."""
    low, high = -(2 ** (bit - 1)), 2 ** (bit - 1) - 1
    for _ in range(3):
        x = (torch.randn(size).clamp(-3.9, 3.9) * 0.9).requires_grad_()
        grad = torch.randn(size)
        scale = torch.full((1,), 8 / 2**bit, requires_grad=True)
        with ops.eager_mode():
            y = ops.fake_quantize_learned(x, scale, torch.zeros(1, dtype=torch.int32), low, high)
            y.backward(grad)
        assert (y - x).abs().max() <= scale.item() / 2 + 2**-23
        exact = scale.detach().double().requires_grad_()
        step_formula(x.detach().double(), exact, 0, low, high).backward(grad.double())
        assert scale.grad.item() == pytest.approx(exact.grad.item(), rel=1e-5, abs=1e-4 * math.sqrt(size))


@pytest.mark.parametrize('axis', [-1, 1])
@pytest.mark.parametrize('kind', OPERATIONS)
def test_second_derivatives_through_the_incoming_gradient(kind, axis):
    """A gradient is linear in the one that comes in; differentiated by that, it gives the first derivatives back."""
    function, _, learned_count, _ = OPERATIONS[kind]
    raw = params_of(kind, 6 if axis == 1 else 1, -8, 7)
    params = [p.double().requires_grad_(i < learned_count) for i, p in enumerate(raw)]
    x = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    inputs = [x, *params[:learned_count]]
    firsts = torch.autograd.grad((function(x, *params, -8, 7, axis) * weight).sum(), inputs, create_graph=True)
    for i, first in enumerate(firsts):
        (by_weight,) = torch.autograd.grad(first.sum(), weight, retain_graph=True)
        again = torch.autograd.grad((function(x, *params, -8, 7, axis) * by_weight).sum(), inputs)
        one = torch.autograd.grad((function(x, *params, -8, 7, axis) * weight).sum(), inputs)
        torch.testing.assert_close((by_weight * weight).sum(), one[i].sum())
        assert all(torch.isfinite(g).all() for g in again)


def test_second_derivative_of_the_input():
    x = torch.randn(50, dtype=torch.float64, requires_grad=True)
    scale = torch.tensor([0.25], dtype=torch.float64, requires_grad=True)
    y = ops.fake_quantize_learned(x, scale, torch.zeros(1), -8, 7)
    (first,) = torch.autograd.grad((y**2).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    inside = (torch.round(x / 0.25) >= -8) & (torch.round(x / 0.25) <= 7)
    assert torch.equal(second, 2.0 * inside)


def test_second_derivative_of_the_scale():
    """The derivative of the computed gradient, sum of (d - x / s), which is that of finite differences."""
    x = torch.randn(50, dtype=torch.float64)

    def gradient(value, create_graph):
        scale = torch.tensor([value], dtype=torch.float64, requires_grad=True)
        y = ops.fake_quantize_learned(x, scale, torch.zeros(1), -8, 7)
        return scale, torch.autograd.grad(y.sum(), scale, create_graph=create_graph)[0]

    scale, first = gradient(0.25, True)
    (second,) = torch.autograd.grad(first.sum(), scale)
    step = 1e-7
    finite = (gradient(0.25 + step, False)[1] - gradient(0.25 - step, False)[1]) / (2 * step)
    torch.testing.assert_close(second, finite, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('kind', OPERATIONS)
def test_no_gradient_where_none_is_required(kind):
    function, _, learned_count, _ = OPERATIONS[kind]
    params = params_of(kind, 1, -8, 7)
    x = torch.randn(30)
    assert not function(x, *params, -8, 7).requires_grad
    with torch.no_grad():
        leaf = x.clone().requires_grad_()
        assert not function(leaf, *params, -8, 7).requires_grad
    function(leaf, *params, -8, 7).sum().backward()
    assert leaf.grad is not None and all(p.grad is None for p in params)
    params[0].requires_grad_()
    function(x, *params, -8, 7).sum().backward()
    assert params[0].grad is not None and x.grad is None and all(p.grad is None for p in params[1:])
    with torch.inference_mode():
        assert torch.equal(function(x, *params, -8, 7), function(x, *params, -8, 7))


@pytest.mark.parametrize('kind', OPERATIONS)
def test_empty_tensors(kind):
    function, _, learned_count, _ = OPERATIONS[kind]
    params = [p.requires_grad_(i < learned_count) for i, p in enumerate(params_of(kind, 1, -8, 7))]
    x = torch.zeros(0, 4, requires_grad=True)
    function(x, *params, -8, 7).sum().backward()
    assert x.grad.shape == (0, 4) and all(p.grad.item() == 0 for p in params[:learned_count])


@pytest.mark.parametrize('kind', OPERATIONS)
def test_results_may_be_changed_in_place(kind):
    function, *_ = OPERATIONS[kind]
    params = params_of(kind, 1, -8, 7)
    x = torch.randn(30, requires_grad=True)
    y = function(x, *params, -8, 7)
    expected = torch.relu(y.detach())
    assert torch.equal(y.relu_(), expected)
    y.sum().backward()
    assert x.grad is not None


def test_unused():
    x = torch.randn(3, 4, requires_grad=True)
    params = [torch.nn.Parameter(torch.ones(n)) for n in (1, 4)]
    y = ops.unused(x, *params)
    assert torch.equal(y, x)
    (y * 2).sum().backward()
    assert (x.grad == 2).all()
    assert [p.grad.tolist() for p in params] == [[0.0], [0.0] * 4]


def test_unused_with_an_input_that_needs_no_gradient():
    parameter = torch.nn.Parameter(torch.ones(1))
    ops.unused(torch.randn(3), parameter).sum().backward()
    assert parameter.grad.item() == 0


def test_unused_may_be_changed_in_place():
    """An in-place addition follows a quantizer of additions."""
    x, parameter = torch.randn(3, requires_grad=True), torch.nn.Parameter(torch.ones(1))
    y = ops.unused(x * 1, parameter)
    y += 1
    y.sum().backward()
    assert (x.grad == 1).all() and parameter.grad.item() == 0
