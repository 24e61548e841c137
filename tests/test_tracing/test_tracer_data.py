"""Nothing that depends on tensor data is burnt into a graph."""

from __future__ import annotations

import types

import pytest
import torch
import torch.nn.functional as F
from capturing import Net, assert_follows, capture
from torch import nn

from mmrazor_quant.tracing import CustomTracer, DataDependentError
from mmrazor_quant.tracing.errors import UnrecordedValueError
from mmrazor_quant.tracing.finder import capture_graph, equal

X = torch.linspace(-2, 3, 2 * 3 * 6 * 6).reshape(2, 3, 6, 6)
OTHER = torch.linspace(7, -9, 2 * 3 * 6 * 6).reshape(2, 3, 6, 6)

REFUSED = {
    'bool(tensor)': lambda m, x: x * 2 if x.sum() > 0 else x,
    'any': lambda m, x: x * 2 if (x > 2).any() else x,
    'item': lambda m, x: x * 2 if x.sum().item() > 0 else x,
    'bool item': lambda m, x: x * 2 if (x > 2).all().item() else x,
    'arithmetic on an item': lambda m, x: x * 2 if x.sum().item() * 2 + 1 > 0 else x,
    'int(tensor)': lambda m, x: x * int(x.max()),
    'int(item)': lambda m, x: x * int(x.max().item()),
    'float(tensor)': lambda m, x: x * float(x.max()),
    'range of a tensor': lambda m, x: [x for _ in range(x.argmax() % 7)],
    'a list indexed by a tensor': lambda m, x: [x, x * 2, x * 3][x.argmax() % 3],
    'a dict looked up by an item': lambda m, x: {i: x * i for i in range(7)}.get(x.argmax().item() % 7),
    'in': lambda m, x: x * 2 if 0 in x else x * 3,
    'numpy': lambda m, x: x * 2 if x.detach().numpy().sum() > 0 else x * 3,
    'tolist': lambda m, x: x * 2 if sum(x.flatten()[:2].tolist()) > 0 else x * 3,
    'min of an item': lambda m, x: x * min(x.max().item(), 2.0),
    'max of tensors': lambda m, x: max(x.flatten()[0], x.flatten()[1]) * x,
    'sorted': lambda m, x: sorted(x.flatten()[:3]),
    'shape of nonzero': lambda m, x: x * 2 if (x > 1).nonzero().shape[0] > 3 else x * 3,
    'shape of where': lambda m, x: x * 2 if torch.where(x > 0)[0].shape[0] > 70 else x * 3,
    'length of a masked tensor': lambda m, x: x * 2 if len(x[x > 0]) > 3 else x,
    'shape of a masked tensor': lambda m, x: x * 2 if x[x > 0].shape[0] > 70 else x * 3,
    'shape of a mask among indices': lambda m, x: x * 2 if x[:, x[0, :, 0, 0] > 0].shape[1] > 1 else x * 3,
    'iteration over a masked tensor': lambda m, x: sum(x[x > 0]),
    'masked_select': lambda m, x: x * 2 if x.masked_select(x > 0).numel() > 70 else x * 3,
    'unique': lambda m, x: x * 2 if x.round().unique().shape[0] > 5 else x * 3,
    'bincount': lambda m, x: x * 2 if torch.bincount(x.abs().long().flatten()).shape[0] > 5 else x * 3,
    'torch.equal': lambda m, x: x * 2 if torch.equal(x, x.abs()) else x * 3,
    'allclose': lambda m, x: x * 2 if torch.allclose(x, x.abs()) else x * 3,
    'allclose method': lambda m, x: x * 2 if x.allclose(x.abs()) else x * 3,
    'is_nonzero': lambda m, x: x * 2 if x.sum().is_nonzero() else x * 3,
    'repeat_interleave': lambda m, x: x * 2 if repeated(x).shape[1] > 4 else x * 3,
    'one_hot': lambda m, x: x * 2 if F.one_hot(x.abs().long()).shape[-1] > 5 else x * 3,
    'arange of a tensor': lambda m, x: x * 2 if torch.arange(x.abs().max().int()).shape[0] > 5 else x * 3,
    'slice by a tensor': lambda m, x: x * 2 if x.flatten(1)[:, : x.max().int()].shape[1] > 5 else x * 3,
    'a mask in a list': lambda m, x: x * 2 if x[[x > 0]].shape[0] > 70 else x * 3,
    'a list indexed by an item': lambda m, x: x * [1, 2, 3, 4][x.argmax().item() % 4],
    'range of an item': lambda m, x: sum([x for _ in range(x.argmax().item() % 7)], x),
    'text of an item': lambda m, x: {f'{x.sum().item():.2f}': x},
}


def repeated(x):
    return x.repeat_interleave((x[0, :, 0, 0] > 0).long() + 1, dim=1)


@pytest.mark.parametrize('name', REFUSED)
def test_python_that_goes_on_with_data_is_refused(name):
    with pytest.raises(DataDependentError):
        capture(Net(REFUSED[name]).eval(), X)


FOLLOWED = {
    'an item as a factor': lambda m, x: x * x.max().item() + x.argmax().item(),
    'masked indexing': lambda m, x: x[x > 0].mean(),
    'nonzero': lambda m, x: (x > 1).nonzero().reshape(-1).float() * 2,
    'the number of nonzeros': lambda m, x: x * (x > 1).nonzero().shape[0],
    'where': lambda m, x: torch.where(x > 0, x, -x) + x.where(x > 0, -x),
    'indexing by an argmax': lambda m, x: x[0][x.argmax() % 3],
    'slicing by an item': lambda m, x: x[:, :, : x.abs().max().int().item() % 5],
    'arange of a tensor': lambda m, x: torch.arange(x.abs().max().int()).float() * 2,
    'a tensor of items': lambda m, x: x * torch.tensor([x.max().item(), 1.0]).sum(),
    'a stack of scalars': lambda m, x: torch.stack([x.max(), x.min()]),
    'sort': lambda m, x: x.flatten(1).sort(1)[0],
    'the rounded item': lambda m, x: x * round(x.max().item()),
}


@pytest.mark.parametrize('name', FOLLOWED)
def test_data_that_only_tensors_see_follows_the_input(name):
    assert_follows(FOLLOWED[name], X, OTHER)


def test_the_message_says_what_was_read():
    with pytest.raises(DataDependentError, match='Tensor.__bool__'):
        capture(Net(lambda m, x: x if x.sum() > 0 else -x), X)


def test_a_failed_capture_leaves_the_tracer_usable():
    from mmrazor_quant.tracing import CustomTracer
    from mmrazor_quant.tracing.code import compile_graph

    tracer = CustomTracer()
    with pytest.raises(DataDependentError):
        tracer.capture(Net(lambda m, x: x if x.sum() > 0 else -x), (X,), {})
    module = Net(lambda m, x: m.conv(x))

    graph = tracer.capture(module, (X,), {})

    assert equal(compile_graph(graph)(module, OTHER), module(OTHER))


def test_a_number_written_out_is_a_constant():
    def forward(module, x):
        return module.conv(x) / torch.Tensor([4.0]).to(x.dtype)

    model = Net(forward).eval()
    captured = capture(model, X)

    assert torch.equal(captured(2 * X), model(2 * X))


def test_a_tensor_of_an_object_is_a_constant():
    anchors = types.SimpleNamespace(of_levels=[torch.arange(4.0).reshape(4, 1, 1)])
    model = Net(lambda module, x: module.conv(x) + module.generator.of_levels[0], generator=anchors).eval()
    captured = capture(model, X)

    assert torch.equal(captured(2 * X), model(2 * X))


def test_a_number_computed_behind_the_recording_is_no_constant():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            return self.conv(x) / torch.Tensor([largest_of(x)])

    model = Net(lambda module, x: module.scaled(module.first(x)), first=nn.Conv2d(3, 3, 1), scaled=Scaled()).eval()
    graph = capture_graph(CustomTracer(), model, (X,), {}, frozenset())

    assert [node.target for node in graph.nodes if node.op == 'call_module'] == ['first', 'scaled']
    with pytest.raises(UnrecordedValueError, match="is used in ''"):
        capture_graph(CustomTracer(), Scaled(), (X,), {}, frozenset())


def largest_of(x):
    """Reads a tensor as an extension in C++ does."""
    with torch._C.DisableTorchFunction():
        return float(x.max())
