"""Functions made of graphs: few variables, the same values."""

from __future__ import annotations

import weakref
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from mmrazor_quant.tracing import code
from mmrazor_quant.tracing.code import compile_graph


def test_variables_do_not_grow_with_the_graph() -> None:
    """A frame of thousands of variables makes Python get memory from the system at each call."""
    x = torch.randn(3)

    def chain(length: int) -> fx.Graph:
        graph = fx.Graph()
        value = graph.placeholder('x')
        for _ in range(length):
            value = graph.call_function(torch.add, (value, 1.0))
        graph.output(value)
        return graph

    long = compile_graph(chain(2500))
    assert long.__code__.co_nlocals < 6
    assert torch.allclose(long(nn.Module(), x), x + 2500)


@given(st.data())
def test_random_graphs_compute_what_they_say(data: st.DataObject) -> None:
    """Values that live long, short, at once, or are never used, return what the interpreter of graphs returns."""
    graph = fx.Graph()
    values = [graph.placeholder('x'), graph.placeholder('y')]
    for number in range(data.draw(st.integers(1, 30))):
        a, b = (values[data.draw(st.integers(0, len(values) - 1))] for _ in range(2))
        values.append(graph.call_function(torch.sub, (a, b), {'alpha': number % 3}))
    graph.output(tuple(data.draw(st.lists(st.sampled_from(values), min_size=1, max_size=4))))
    x, y = torch.arange(4.0), torch.tensor([3.0, -1.0, 2.0, 0.5])
    expected = fx.Interpreter(fx.GraphModule(nn.Module(), graph)).run(x, y)
    with mock.patch.object(code, 'MAX_VARIABLES', 0):
        result = compile_graph(graph)(nn.Module(), x, y)
    assert len(result) == len(expected) and all(map(torch.equal, result, expected))


@pytest.mark.parametrize('most', [0, 256])
def test_values_are_freed_after_their_last_use(monkeypatch, most: int) -> None:
    """Memory does not grow by what is not needed any more."""
    seen: list[weakref.ref] = []
    alive: list[bool] = []

    def remember(x: Tensor) -> Tensor:
        result = x + 1
        seen.append(weakref.ref(result))
        return result

    def look(x: Tensor) -> Tensor:
        alive.append(seen[0]() is not None)
        return x

    graph = fx.Graph()
    first = graph.call_function(remember, (graph.placeholder('x'),))
    second = graph.call_function(torch.add, (first, 1.0))
    early = graph.call_function(look, (second,))
    third = graph.call_function(torch.add, (early, first))
    graph.output(graph.call_function(look, (third,)))
    monkeypatch.setattr(code, 'MAX_VARIABLES', most)
    assert torch.equal(compile_graph(graph)(nn.Module(), torch.zeros(2)), torch.full((2,), 3.0))
    assert alive == [True, False]
