"""Sizes stay symbolic: a graph captured on one input gives the module's own result on another size and batch."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from capturing import Net, assert_follows, capture

from mmrazor_quant.tracing.errors import CaptureError
from mmrazor_quant.tracing.finder import equal

SMALL = torch.linspace(-2, 3, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8)
LARGE = torch.linspace(-1, 5, 5 * 3 * 12 * 10).reshape(5, 3, 12, 10)


def unpacked(module, x):
    n, c, h, w = module.conv(x).shape
    return module.conv(x).reshape(n, c, h * w)


SYMBOLIC = {
    'view': lambda m, x: m.conv(x).view(x.shape[0], -1),
    'size method': lambda m, x: m.conv(x).reshape(x.size(0), x.size(1) + 1, x.size(2) * x.size(3)),
    'unpacking': unpacked,
    'list of sizes': lambda m, x: x.reshape([x.shape[0]] + [-1]),
    'slice of sizes': lambda m, x: F.interpolate(x, size=x.shape[2:]),
    'sizes added': lambda m, x: x.reshape(x.shape[:2] + (-1,)),
    'tuple of sizes': lambda m, x: x.reshape((*tuple(x.shape[:2]), -1)),
    'pad by remainder': lambda m, x: F.pad(x, (0, (7 - x.shape[3] % 7) % 7, 0, -x.shape[2] % 7)),
    'pad by ceil': lambda m, x: F.pad(x, (0, math.ceil(x.shape[3] / 7) * 7 - x.shape[3])),
    'floor': lambda m, x: F.interpolate(x, size=(math.floor(x.shape[2] / 2), x.shape[3] // 2)),
    'math.sqrt': lambda m, x: x / math.sqrt(x.shape[-1]),
    'math.prod': lambda m, x: x * math.prod(x.shape[2:]),
    'power': lambda m, x: x * x.shape[-1] ** -0.5 + 2 ** x.shape[1],
    'round': lambda m, x: x * round(x.shape[2] * 0.3),
    'abs and minus': lambda m, x: x * abs(-x.shape[2]) + (1 - x.shape[3]),
    'numel': lambda m, x: x.sum() / x.numel(),
    'slice by size': lambda m, x: x[:, :, : x.shape[2] // 2, x.shape[3] // 2 :],
    'roll by size': lambda m, x: torch.roll(x, shifts=(x.shape[2] // 2,), dims=(2,)),
    'zeros': lambda m, x: torch.zeros(x.shape[0], x.shape[2], device=x.device) + x.sum((1, 3)),
    'full': lambda m, x: torch.full((x.shape[0], 1), 2.0) * x.mean(),
    'new_zeros': lambda m, x: x.new_zeros(x.shape[0], 2) + 1,
    'arange': lambda m, x: x + torch.arange(x.shape[3], device=x.device, dtype=x.dtype),
    'linspace': lambda m, x: x + torch.linspace(0, 1, x.shape[3], device=x.device),
    'meshgrid': lambda m, x: torch.stack(
        torch.meshgrid(torch.arange(x.shape[2]), torch.arange(x.shape[3]), indexing='ij')
    ),
    'tensor of a size': lambda m, x: x * torch.tensor(x.shape[2]),
    'tensor of sizes': lambda m, x: x * torch.tensor([x.shape[2], x.shape[3]], dtype=torch.float).sum(),
    'expand': lambda m, x: m.conv.bias.expand(x.shape[0], -1) * 1,
    'size in a dict': lambda m, x: x * {'n': x.shape[0]}['n'],
    'device of an input': lambda m, x: torch.zeros(2, device=torch.device(x.device)) + x.sum(),
    'einsum': lambda m, x: torch.einsum('bchw,bcij->bhw', x, x),
}


@pytest.mark.parametrize('name', SYMBOLIC)
def test_sizes_stay_symbolic(name):
    captured = assert_follows(SYMBOLIC[name], SMALL, LARGE)

    assert not {8, 64, 16} & set(_constants(captured.graph)), 'a size of the example is a constant of the graph'


def _constants(graph):
    for node in graph.nodes:
        if node.op in ('call_function', 'call_method'):
            yield from (a for a in torch.utils._pytree.tree_leaves((node.args, node.kwargs)) if isinstance(a, int))


BRANCHING = {
    'branch on a size': lambda m, x: x * 2 if x.shape[2] == 8 else x * 3,
    'branch on an order': lambda m, x: x * min(x.shape[2], x.shape[3] + 1),
    'int()': lambda m, x: F.interpolate(x, size=(int(x.shape[2] / 2), int(x.shape[3] / 2))),
    'float()': lambda m, x: x * float(x.shape[2]),
    'len': lambda m, x: x * len(x),
    'iteration': lambda m, x: torch.stack([a * 2 for a in x]),
    'unbind': lambda m, x: sum(a * i for i, a in enumerate(x.unbind(2))),
    'chunks of a size': lambda m, x: torch.stack([a.sum() for a in x.split(4, 3)]),
    'numpy integer': lambda m, x: x.reshape(np.int64(x.shape[0]), -1),
    'numpy product': lambda m, x: x * int(np.prod(x.shape[2:])),
    'numpy array': lambda m, x: x * int(np.array(x.shape[2:]).sum()),
    'dict by size': lambda m, x: x * {8: 2, 12: 3}[x.shape[2]],
}


@pytest.mark.parametrize('name', BRANCHING)
def test_what_python_decided_by_a_size_is_guarded(name):
    forward = BRANCHING[name]
    module = Net(forward).eval()

    captured = capture(module, SMALL)

    assert equal(module(SMALL), captured(SMALL))
    with pytest.raises(CaptureError):
        captured(LARGE)


def test_a_branch_that_goes_the_same_way_holds_for_other_sizes():
    forward = lambda m, x: x * 2 if x.shape[2] > 4 else x * 3  # noqa: E731

    assert_follows(forward, SMALL, LARGE)


def test_isinstance_of_sizes_and_tensors():
    def forward(module, x):
        assert isinstance(x, torch.Tensor) and torch.is_tensor(x)
        assert isinstance(x.shape[2], int) and isinstance(x.shape[2] / 2, float)
        assert isinstance(x.shape, (tuple, list)) and isinstance(x.device.type, str)
        return x.reshape(x.shape[0], -1)

    assert_follows(forward, SMALL, LARGE)


@pytest.mark.parametrize('number', [np.int64(3), np.int32(3), np.float32(3), np.float64(3)])
def test_numpy_numbers_are_constants(number):
    captured = assert_follows(lambda m, x: x * number + torch.full((1,), number), SMALL, LARGE)

    assert not [c for c in torch.utils._pytree.tree_leaves([n.args for n in captured.graph.nodes])
                if isinstance(c, np.generic)]  # fmt: skip


def test_random_numbers_are_drawn_anew_in_every_call():
    module = Net(lambda m, x: x + torch.rand(x.shape[0], 1, 1, 1, device=x.device) + torch.randn_like(x))

    captured = capture(module, SMALL)

    assert not torch.equal(captured(LARGE), captured(LARGE))
    torch.manual_seed(3)
    expected = module(LARGE)
    torch.manual_seed(3)
    assert torch.equal(captured(LARGE), expected)


def test_factories_follow_the_dtype_of_the_input():
    def forward(module, x):
        mask = torch.ones(x.shape[-2:], dtype=x.dtype, device=x.device)
        return (x * mask).to(torch.float64).to(x.dtype)

    assert_follows(forward, SMALL, LARGE)


def test_a_size_of_the_dynamic_numbers_is_an_input():
    module = Net(lambda m, x, hw: x.reshape(x.shape[0], x.shape[1], hw[0] * hw[1]))
    from mmrazor_quant.tracing import CustomTracer
    from mmrazor_quant.tracing.code import compile_graph

    graph = CustomTracer().capture(module, (SMALL, (8, 8)), {}, dynamic=frozenset({1, 2}))

    function = compile_graph(graph)
    assert torch.equal(function(module, LARGE, 12, 10), module(LARGE, (12, 10)))
