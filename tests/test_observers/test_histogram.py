"""Histograms: counting, growing, and the tails of large batches."""

from __future__ import annotations

import pytest
import torch

from mmrazor_quant.observers import histogram


def count_by_hand(rows, edges):
    index = torch.searchsorted(edges, rows.to(edges.dtype), right=True).clamp(1, edges.shape[1] - 1) - 1
    return torch.stack([torch.bincount(i, minlength=edges.shape[1] - 1) for i in index]).float()


def test_counts_equal_a_search_among_the_edges():
    rows = torch.stack([torch.randn(5000), torch.rand(5000) * 3, -torch.rand(5000) - 2])
    low, high = torch.aminmax(rows, dim=1)
    counts = histogram.count_values(rows, low, high, 64)
    expected = count_by_hand(rows, histogram.bin_edges(low, high, 64))
    assert counts.sum(1).tolist() == [5000] * 3
    assert (counts - expected).abs().sum() <= 10  # values on edges


def test_edges_span_the_range():
    low, high = torch.tensor([-2.0, 0.0, 3.0, 0.0]), torch.tensor([5.0, 1e-3, 3.0, 0.0])
    edges = histogram.bin_edges(low, high, 100)
    torch.testing.assert_close(edges[:, 0], low.double())
    torch.testing.assert_close(edges[:, -1], high.double(), rtol=1e-4, atol=1e-12)
    assert (edges.diff(dim=1) > 0).all()


@pytest.mark.parametrize('grow', [1.0, 1.0001, 1.3, 10.0])
def test_growing_keeps_the_sum_and_the_shape(grow):
    x = torch.randn(1, 50000)
    low, high = torch.aminmax(x, dim=1)
    counts = histogram.count_values(x, low, high, 512)
    grown = histogram.rebin(counts, low, high, low * grow, high * grow)
    assert grown.sum().item() == pytest.approx(50000)
    expected = histogram.count_values(x, low * grow, high * grow, 512)
    difference = (grown.cumsum(1) - expected.cumsum(1)).abs().max()
    assert difference <= counts.max() + 1  # no value has moved by more than a bin
    if grow == 1:
        torch.testing.assert_close(grown, counts, rtol=1e-6, atol=1e-2)


def test_growing_from_nothing_and_from_a_point():
    low, high = torch.tensor([-1.0]), torch.tensor([2.0])
    nothing = histogram.rebin(
        torch.zeros(1, 64), torch.tensor([float('inf')]), torch.tensor([-float('inf')]), low, high
    )
    assert nothing.abs().sum() == 0
    point = torch.tensor([0.5])
    counts = histogram.count_values(torch.full((1, 10), 0.5), point, point, 64)
    grown = histogram.rebin(counts, point, point, low, high)
    edges = histogram.bin_edges(low, high, 64)[0]
    at = grown[0].argmax()
    assert grown.sum() == 10 and edges[at] <= 0.5001 and edges[at + 1] >= 0.4999


def test_block_extremes_cover_every_value():
    rows = torch.randn(2, 61 * 64 + 17)
    extremes = histogram.block_extremes(rows)
    assert torch.equal(extremes[0].amin(1), rows.amin(1)) and torch.equal(extremes[1].amax(1), rows.amax(1))
    rows[0, -1] = 100.0
    assert histogram.block_extremes(rows)[1].max() == 100


@pytest.mark.parametrize('count', [1, 10, 100])
def test_each_rare_outlier_is_counted_once(count):
    n = 200000
    rows = torch.randn(1, n).clamp(-4, 4)
    rows[0, torch.randperm(n)[:count]] = 30.0 + torch.rand(count)
    low, high = torch.aminmax(rows, dim=1)
    stride = histogram.sample_stride(rows, 20000)
    assert stride > 1
    counts = histogram.estimate_counts(rows, histogram.block_extremes(rows), low, high, 2048, stride)
    edges = histogram.bin_edges(low, high, 2048)
    assert counts[edges[:, 1:] > 20].sum().item() == pytest.approx(count, rel=0.03)
    assert counts.sum().item() == pytest.approx(n, rel=0.01)


def test_tails_of_a_smooth_distribution():
    rows = torch.randn(1, 400000)
    low, high = torch.aminmax(rows, dim=1)
    stride = histogram.sample_stride(rows, 2**15)
    counts = histogram.estimate_counts(rows, histogram.block_extremes(rows), low, high, 2048, stride)
    edges = histogram.bin_edges(low, high, 2048)[:, 1:]
    for bound in (2.0, 2.5, 3.0, 3.5):
        for estimated, true in (
            (counts[edges > bound].sum(), (rows > bound).sum()),
            (counts[edges <= -bound].sum(), (rows < -bound).sum()),
        ):
            assert estimated.item() == pytest.approx(true.item(), rel=0.12)


def test_stride_shares_no_factor_with_the_size():
    rows = torch.empty(1, 64 * 32 * 28 * 28)
    stride = histogram.sample_stride(rows, 2**16)
    assert stride % 2 == 1 and stride % 7 != 0
    assert 2**15 < rows.numel() / stride <= 2**16
    assert histogram.sample_stride(rows, None) == 1
    assert histogram.sample_stride(torch.empty(1, 1000), 2**16) == 1
