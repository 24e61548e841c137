"""What the Python around the tensors may do: containers, constants, assignment, attributes, functions of their own."""

from __future__ import annotations

import copy
from collections import namedtuple

import pytest
import torch
import torch.nn.functional as F
from capturing import Net, assert_follows, capture, nodes
from torch import nn

from mmrazor_quant.tracing.errors import CaptureError
from mmrazor_quant.tracing.finder import equal
from mmrazor_quant.tracing.tracer import EXTRAS

X = torch.linspace(-2, 3, 2 * 3 * 6 * 6).reshape(2, 3, 6, 6)
Y = torch.linspace(-1, 5, 4 * 3 * 8 * 6).reshape(4, 3, 8, 6)

Pair = namedtuple('Pair', ['first', 'second'])


FORWARDS = {
    'nested output': lambda m, x: [x, (x + 1, {'a': x * 2, 'b': [x]})],
    'named tuple output': lambda m, x: Pair(x * 2, x + 1),
    'None in the output': lambda m, x: (x * 2, None, {'nothing': None}),
    'the input itself': lambda m, x: (x, x),
    'chunk': lambda m, x: torch.cat([a * 2 for a in x.chunk(3, 1)], 1),
    'split': lambda m, x: torch.cat([a * 2 for a in torch.split(x, [1, 2], 1)], 1),
    'zip of channels': lambda m, x: sum(a * i for a, i in zip(x.unbind(1), range(3))),
    'max over a dimension': lambda m, x: x.max(dim=1)[0] + x.max(1).values,
    'topk': lambda m, x: x.flatten(1).topk(3).values,
    'star arguments': lambda m, x: torch.cat([*x.chunk(3, 1), *x.chunk(3, 1)], 1),
    'item assignment': lambda m, x: assigned(x.clone()),
    'assignment by mask': lambda m, x: masked(x.clone()),
    'in-place methods': lambda m, x: x.clone().add_(1).mul_(2),
    'in-place operators': lambda m, x: in_place(x * 1),
    'an alias written to': lambda m, x: aliased(x * 1),
    'functional layers': lambda m, x: F.relu(F.conv2d(x, m.conv.weight, m.conv.bias, padding=1), inplace=True),
    'a computed weight': lambda m, x: F.conv2d(x, m.conv.weight - m.conv.weight.mean((1, 2, 3), keepdim=True)),
    'a constant made in forward': lambda m, x: x * torch.tensor([1.0, 2.0, 3.0])[:, None, None],
    'type_as': lambda m, x: torch.ones(3, 1, 1).type_as(x) * x,
    'requires_grad': lambda m, x: x * 2 if x.requires_grad else x * 3,
    'properties': lambda m, x: x[0, 0].T @ x[0, 0] * x.is_floating_point() + (not x.is_cuda),
    'detach': lambda m, x: x.detach() * 2,
    'indexing by a tensor': lambda m, x: x[:, torch.tensor([2, 0])] + x[:, [0, 1]],
    'Ellipsis and None': lambda m, x: x[..., None, 0] + x[None, ..., -1, None][0],
    'format of a size': lambda m, x: {f'{x.dim()} dimensions': x * 2},
}


def assigned(x):
    x[:, 0:1] = 0.0
    x[:, :, x.shape[2] // 2] = x[:, :, 0] * 2
    return x


def masked(x):
    x[x > 0] = -1.0
    return x


def in_place(x):
    x += 1
    x *= 2
    x -= x.mean()
    return x


def aliased(x):
    first = x[:, 0]
    first.mul_(10)
    return x + 1


@pytest.mark.parametrize('name', FORWARDS)
def test_forward_of_many_kinds(name):
    assert_follows(FORWARDS[name], X, Y)


INPUTS = {
    'tuple': ((X, X + 1), lambda m, xs: xs[0] + xs[1]),
    'list unpacked': ([X, X + 1, X * 2], lambda m, xs: sum(m.conv(x) for x in xs)),
    'enumerate and len': ((X, X + 1), lambda m, xs: [x * i / len(xs) for i, x in enumerate(xs)]),
    'reversed and sliced': ((X, X + 1, X * 2), lambda m, xs: torch.cat([*reversed(xs), *xs[1:], xs[-1]])),
    'dict': ({'a': X, 'b': X + 1}, lambda m, d: {k: v * 2 for k, v in d.items()} | {'sum': d['a'] + d.get('b')}),
    'nested': (({'a': (X, [X + 1])}, X * 2), lambda m, v: v[0]['a'][1][0] + v[1] - v[0]['a'][0]),
    'with constants': ((X, 2, 'add', None), lambda m, v: v[0] + v[1] if v[2] == 'add' and v[3] is None else v[0]),
    'named tuple': (Pair(X, X + 1), lambda m, p: p.first * 2 + p.second),
}


@pytest.mark.parametrize('name', INPUTS)
def test_nested_inputs(name):
    value, forward = INPUTS[name]
    larger = torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: F.interpolate(t, size=(8, 7)), value)

    assert_follows(forward, value, larger)


def test_keyword_arguments_and_defaults():
    module = Net(lambda m, x, *, shift=None, scale=2.0: x * scale if shift is None else x * scale + shift)

    captured = capture(module, X, shift=X + 1, scale=3.0)

    assert torch.equal(captured(Y, shift=Y * 2, scale=3.0), module(Y, shift=Y * 2, scale=3.0))
    assert len(nodes(captured.graph, 'placeholder')) == 2


def test_parameters_and_buffers_are_read_when_the_graph_runs():
    module = Net(
        lambda m, x: x * m.gain + m.offset + m.conv.bias[:3, None, None], gain=nn.Parameter(torch.ones(3, 1, 1))
    )
    module.register_buffer('offset', torch.zeros(1))
    captured = capture(module, X)

    with torch.no_grad():
        module.gain.mul_(3)
        module.offset.add_(1)
        module.conv.bias.mul_(2)

    assert torch.equal(captured(X), module(X))
    assert set(captured.targets('get_attr')) == {'gain', 'offset', 'conv.bias'}


def test_a_replaced_parameter_is_the_one_used():
    module = Net(lambda m, x: x * m.gain, gain=nn.Parameter(torch.ones(1)))
    captured = capture(module, X)

    module.gain = nn.Parameter(torch.full((1,), 5.0))

    assert torch.equal(captured(X), X * 5)


def test_gradients_reach_parameters_and_inputs():
    module = Net(lambda m, x: (m.conv(x) * m.gain).relu(), gain=nn.Parameter(torch.ones(1)))
    captured = capture(module, X)

    grads = []
    for function in (module, captured):
        module.zero_grad()
        x = X.clone().requires_grad_()
        function(x).sum().backward()
        grads.append([x.grad, *(p.grad for p in module.parameters())])

    assert all(torch.equal(a, b) for a, b in zip(*grads))


def test_tensors_in_ordinary_attributes_are_constants_that_move_and_stay_out_of_the_state_dict():
    module = Net(lambda m, x: x * m.scale + m.table['shift'][0], scale=torch.full((3, 1, 1), 2.0))
    module.table = {'shift': [torch.ones(1)]}
    keys = list(module.state_dict())
    captured = capture(module, X)

    assert torch.equal(captured(Y), module(Y))
    assert list(module.state_dict()) == keys
    assert module.get_submodule(EXTRAS)
    module.to(torch.float64)
    assert captured(Y.double()).dtype == torch.float64
    assert {b.dtype for b in module.get_submodule(EXTRAS).buffers()} == {torch.float64}


def test_constants_of_a_copy_are_its_own():
    module = Net(lambda m, x: x * m.scale, scale=torch.full((1,), 2.0))
    captured = capture(module, X)
    twin = copy.deepcopy(module)

    for buffer in twin.get_submodule(EXTRAS).buffers():
        buffer.zero_()

    assert torch.equal(captured(X), X * 2)


def test_submodules_with_layers_are_traced_through_and_layers_are_nodes():
    module = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), nn.ReLU(), nn.LayerNorm(4))

    captured = capture(module, X)

    assert captured.targets('call_module') == ['0.0', '0.1', '1', '2']


class PaddedConv(nn.Conv2d):
    """A layer with a forward of its own."""

    def forward(self, x):
        return super().forward(F.pad(x, (1, 1, 1, 1)))


def test_subclasses_of_layers_are_nodes():
    captured = capture(nn.Sequential(PaddedConv(3, 2, 3), nn.Flatten(), nn.Linear(72, 3)), X)

    assert captured.targets('call_module') == ['0', '1', '2']


def test_calls_of_layers_keep_their_keyword_arguments():
    module = Net(lambda m, x: m.up(x, output_size=[x.shape[2] * 2 + 1, x.shape[3] * 2 + 1]))
    module.up = nn.ConvTranspose2d(3, 2, 3, stride=2)

    captured = capture(module, X)

    assert torch.equal(captured(Y), module(Y))


class TwiceGradient(torch.autograd.Function):
    """Identity whose gradient is doubled."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x * 1

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.factor, None


def test_custom_autograd_functions_keep_their_backward():
    module = Net(lambda m, x: TwiceGradient.apply(m.conv(x), 2).relu())
    captured = capture(module, X)

    x = X.clone().requires_grad_()
    captured(x).sum().backward()
    found = x.grad
    x = X.clone().requires_grad_()
    module(x).sum().backward()

    assert torch.equal(found, x.grad)
    plain = torch.autograd.grad(module.conv(x).relu().sum(), x)[0]
    assert torch.allclose(found, plain * 2)


@pytest.mark.xfail(strict=True, reason='str() of a size shows the traced value')
def test_str_of_a_size():
    assert_follows(lambda m, x: getattr(m, 'con' + 'v' * (str(x.shape[1]) == '3'))(x), X, Y)


def test_what_runs_without_gradient_stays_without():
    @torch.no_grad()
    def teacher(module, x):
        return module.conv(x) * 3

    def forward(module, x):
        with torch.no_grad():
            first = module.conv(x)
        return module.conv(x) * first + teacher(module, x)

    module = Net(forward)
    captured = capture(module, X)

    grads = []
    for function in (module, captured):
        module.zero_grad()
        function(X).sum().backward()
        grads.append(module.conv.weight.grad.clone())
    assert torch.equal(*grads)
    with torch.no_grad():
        assert not captured(X).requires_grad


BURNT_IN = pytest.mark.xfail(strict=True, reason='the dtype of the example is a constant of the graph')


@pytest.mark.parametrize('dtype', [torch.float64, pytest.param(torch.bfloat16, marks=BURNT_IN)])
def test_the_dtype_of_the_input_is_followed(dtype):
    module = Net(lambda m, x: x * torch.ones(3, 1, 1, dtype=x.dtype) + torch.zeros(1).to(x.dtype))

    captured = capture(module, X)

    assert captured(X.to(dtype)).dtype == module(X.to(dtype)).dtype == dtype


class Unseen(nn.Module):
    """Computes through numpy, which no torch function shows."""

    def forward(self, x):
        with torch._C.DisableTorchFunction():
            data = torch.from_numpy(x.detach().as_subclass(torch.Tensor).numpy() * 3)
        return data.to(x.dtype) + 0


class SeenAround(nn.Module):
    """Layers around something that cannot be traced."""

    def __init__(self):
        super().__init__()
        self.conv, self.op, self.last = nn.Conv2d(3, 3, 1), Unseen(), nn.Conv2d(3, 2, 1)

    def forward(self, x):
        return self.last(self.op(self.conv(x)))


def test_a_value_that_nothing_recorded_is_refused_and_an_opaque_module_computes_it():
    from capturing import Captured

    module = SeenAround().eval()
    with pytest.raises(CaptureError):
        capture(module, X)

    captured = Captured(module, (X,), {}, opaque=['op'])

    with torch.no_grad():
        assert torch.equal(captured(Y), module(Y))
    assert captured.targets('call_module') == ['conv', 'op', 'last']


def test_shared_modules_are_called_twice_over_one_set_of_weights():
    module = Net(lambda m, x: m.head(x) + m.head(x + 1))
    module.head = nn.Conv2d(3, 2, 1)

    captured = capture(module, X)

    assert captured.targets('call_module') == ['head', 'head']
    assert torch.equal(captured(Y), module(Y))


def test_methods_and_helpers_of_the_module_are_traced_through():
    class Methods(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        @property
        def doubled(self):
            return self.conv.weight * 2

        @staticmethod
        def helper(x, n):
            return x.reshape(n, -1)

        def forward(self, x):
            x = F.conv2d(self.conv(x), self.doubled)
            return self.helper(x, x.shape[0])

    module = Methods()
    captured = capture(module, X)

    assert equal(captured(Y), module(Y))


def test_assigning_an_attribute_of_a_traced_tensor_is_refused():
    def forward(module, x):
        x.data = x.data * 2
        return x

    with pytest.raises(CaptureError, match='data'):
        capture(Net(forward), X.clone())


def test_unused_reads_leave_no_nodes():
    def forward(module, x):
        n, c, h, w = x.shape
        assert c == 3
        return module.conv(x)

    captured = capture(Net(forward), X)

    assert not [n for n in nodes(captured.graph, 'call_function') if n.target is getattr and not n.users]
