"""Assertions about data in traced code."""

from __future__ import annotations

import pytest
import torch
from asserting import branching, not_negative, positive, positive_with_words, raising
from capturing import Net, capture

from mmrazor_quant.tracing import DataDependentError

X = torch.linspace(0.1, 3, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8)


@pytest.mark.parametrize('forward', [positive, positive_with_words, not_negative])
def test_an_assertion_holds_in_the_graph_too(forward):
    module = Net(forward).eval()
    captured = capture(module, X)

    assert torch.equal(captured(X * 2), module(X * 2))
    with pytest.raises(AssertionError):
        captured(-X)


@pytest.mark.parametrize('forward', [branching, raising])
def test_other_branches_on_data_are_refused(forward):
    with pytest.raises(DataDependentError):
        capture(Net(forward).eval(), X)


def test_an_assertion_that_fails_on_the_example_fails_the_capture():
    with pytest.raises(AssertionError):
        capture(Net(positive).eval(), -X)
