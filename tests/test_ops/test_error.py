"""Quantization error of many candidates, on values and on histograms."""

from __future__ import annotations

import pytest
import torch

from mmrazor_quant import ops
from mmrazor_quant.ops.error import histogram_error, value_error


def candidates(rows, quant_min, quant_max, symmetric):
    factors = torch.linspace(0.2, 1, 9).unsqueeze(1)
    low, high = torch.aminmax(rows, dim=1)
    return ops.qparams_from_range(factors * low, factors * high, quant_min, quant_max, symmetric)


@pytest.mark.parametrize('p', [2, 2.4])
@pytest.mark.parametrize('width', [20, 3000], ids=['eager', 'compiled'])
def test_value_error(compile_at_once, p, width):
    rows = torch.randn(4, width)
    scale, zero_point = candidates(rows, 0, 15, False)
    errors = value_error(rows, scale, zero_point, 0, 15, p)
    for s, z, error in zip(scale, zero_point, errors):
        expected = (ops.fake_quantize(rows, s, z, 0, 15, 0) - rows).abs().pow(p).sum(1)
        torch.testing.assert_close(error, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('p', [2, 2.4])
@pytest.mark.parametrize('bit', [2, 8])
def test_histogram_error_is_the_integral(compile_at_once, p, bit):
    """On a histogram with a few bins of any width: equal to the sum over many values spread evenly over each bin."""
    edges = torch.tensor([[-3.0, -1.0, -0.9, 0.0, 0.05, 2.0, 7.0]], dtype=torch.float64)
    counts = torch.tensor([[5.0, 100.0, 30.0, 400.0, 20.0, 1.0]], dtype=torch.float64)
    density = torch.nn.functional.pad(counts / edges.diff(dim=1), (1, 1))
    steps = (torch.arange(20000, dtype=torch.float64) + 0.5) / 20000
    values = edges[:, :-1, None] + edges.diff(dim=1)[..., None] * steps
    scale, zero_point = candidates(edges.float(), 0, 2**bit - 1, False)
    errors = histogram_error(edges, density[:, :-1] - density[:, 1:], scale, zero_point, 0, 2**bit - 1, p)
    for s, z, error in zip(scale, zero_point, errors):
        mean = (ops.fake_quantize(values, s, z, 0, 2**bit - 1) - values).abs().pow(p).mean(2)
        torch.testing.assert_close(error, (mean * counts).sum(1), rtol=1e-3, atol=1e-6)
