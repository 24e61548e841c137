"""Ranges of least divergence, against the definition written out in loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mmrazor_quant import ops
from mmrazor_quant.observers import HistogramObserver, MinMaxObserver, MSEObserver, divergence, histogram
from mmrazor_quant.qscheme import QScheme


def divergence_by_hand(counts, edges, scale, zero_point, scheme, parts):
    """D of one channel; counts of the bins are spread evenly in sqrt|x|, as the histogram does."""

    def below(x):
        u, at = np.sign(edges) * np.sqrt(np.abs(edges)), np.sign(x) * np.sqrt(abs(x))
        return np.interp(at, u, np.concatenate([[0.0], np.cumsum(counts)]))

    total = counts.sum()
    inside, reference = [], []
    for level in range(scheme.quant_min, scheme.quant_max + 1):
        start = (level - zero_point - 0.5) * scale
        cuts = [below(start + scale * j / parts) for j in range(parts + 1)]
        inside.append([b - a for a, b in zip(cuts, cuts[1:])])
    reference = np.array(inside)
    end = max(1, parts // 8)
    first = below((scheme.quant_min - zero_point - 0.5) * scale)
    last = below((scheme.quant_max - zero_point + 0.5) * scale)
    reference[0, :end] += first / end
    reference[-1, -end:] += (total - last) / end
    found = 0.0
    for level, values in enumerate(inside):
        occupied = [j for j in range(parts) if reference[level, j] > 1e-9 * total]
        for j in occupied:
            p, q = reference[level, j] / total, sum(values) / len(occupied) / total
            found += p * np.log(p / max(q, 1e-9))
    return found


@pytest.mark.parametrize('scheme', [QScheme(bit=2), QScheme(bit=3, is_symmetry=False), QScheme(bit=1, is_signed=False)])
def test_divergence_by_its_definition(scheme):
    rows = torch.stack([torch.randn(3000), torch.randn(3000).exp() - 1])
    low, high = torch.aminmax(rows, dim=1)
    counts = histogram.count_values(rows, low, high, 256)
    error = divergence.histogram_divergence(counts, low, high, scheme.quant_min, scheme.quant_max)
    factors = torch.tensor([[1.0], [0.7], [0.4], [0.1]])
    scale, zero_point = ops.qparams_from_range(
        low * factors, high * factors, scheme.quant_min, scheme.quant_max, scheme.is_symmetry
    )
    found = error(scale, zero_point)
    kept = counts.masked_fill(histogram.bins_at_zero(low, high, 256), 0).double().numpy()
    edges = histogram.bin_edges(low, high, 256).numpy()
    parts = divergence.parts_per_level(256, scheme.quant_min, scheme.quant_max)
    for m in range(len(factors)):
        for c in range(2):
            by_hand = divergence_by_hand(kept[c], edges[c], scale[m, c].item(), zero_point[m, c].item(), scheme, parts)
            assert found[m, c].item() == pytest.approx(by_hand, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize('data', [torch.randn(40000), torch.randn(40000).relu(), torch.randn(40000).exp()])
@pytest.mark.parametrize('bit', [2, 4, 8])
def test_search_finds_the_least(data, bit):
    for symmetric in (True, False):
        scheme = QScheme(bit=bit, is_symmetry=symmetric)
        observer = HistogramObserver(**scheme.observer_params(), max_samples=None)
        observer(data)
        low, high = observer.min_val, observer.max_val
        error = divergence.histogram_divergence(observer.counts, low, high, scheme.quant_min, scheme.quant_max)
        steps = torch.linspace(0.02, 1, 60).unsqueeze(1)
        pairs = (steps, steps) if symmetric else (steps.repeat_interleave(60, 0), steps.repeat(60, 1))
        tried = error(*observer.to_qparams(low.clamp(max=0) * pairs[0], high * pairs[1]))
        found = error(*(v.unsqueeze(0) for v in observer.running_qparams()))
        assert found <= tried.min() * 1.1 + 1e-3


def squared_error(observer, x):
    scale, zero_point = observer.calculate_qparams()
    return (ops.fake_quantize(x, scale, zero_point, observer.quant_min, observer.quant_max) - x).square().mean().item()


@pytest.mark.parametrize('symmetric', [True, False])
@pytest.mark.parametrize('bit', [4, 8])
def test_error_is_less_than_that_of_min_max(bit, symmetric):
    """Of bell-shaped data, rectified or not, with long tails or short ones."""
    laplacian = torch.distributions.Laplace(0.0, 1.0).sample((200000,))
    for x in (torch.randn(200000), torch.randn(200000).relu(), laplacian, laplacian.relu()):
        errors = []
        for kind in (HistogramObserver, MinMaxObserver):
            observer = kind(**QScheme(bit=bit, is_symmetry=symmetric).observer_params())
            observer(x)
            errors.append(squared_error(observer, x))
        assert errors[0] <= 1.02 * errors[1]
        if bit == 4 and symmetric:
            assert errors[0] < 0.7 * errors[1]


def test_many_zeros_do_not_count():
    x = torch.randn(100000)
    scheme = QScheme(bit=4, is_symmetry=False)
    observers = [HistogramObserver(**scheme.observer_params(), max_samples=None) for _ in range(2)]
    observers[0](x)
    observers[1](torch.cat([x, torch.zeros(300000)]))
    torch.testing.assert_close(observers[0].calculate_qparams()[0], observers[1].calculate_qparams()[0])


def test_values_that_all_matter_are_kept():
    """The least divergence of a constant, of two values and of a uniform distribution is at the full range."""
    for x in (torch.full((1000,), 2.5), (torch.rand(10000) > 0.7).float() * 2.5, torch.rand(100000) * 2.5):
        for bit in (4, 8):
            observer = HistogramObserver(**QScheme(bit=bit, is_symmetry=False).observer_params(), max_samples=None)
            observer(x)
            assert observer.observed_range()[1].item() == pytest.approx(2.5, rel=1.0 / 2**bit)


@pytest.mark.parametrize('bit', [10, 16, 32])
def test_many_levels_take_all_data(bit):
    x = torch.randn(10000)
    observer = HistogramObserver(**QScheme(bit=bit, is_symmetry=False).observer_params())
    observer(x)
    assert [v.item() for v in observer.observed_range()] == [x.min().item(), x.max().item()]


def test_channels_are_independent():
    x = torch.stack([torch.randn(20000), torch.randn(20000).relu() * 100, torch.rand(20000) * 1e-3])
    whole = HistogramObserver(**QScheme(bit=4, is_per_channel=True).observer_params(), max_samples=None)
    whole(x)
    for i, row in enumerate(x):
        single = HistogramObserver(**QScheme(bit=4).observer_params(), max_samples=None)
        single(row)
        torch.testing.assert_close(single.calculate_qparams()[0], whole.calculate_qparams()[0][i : i + 1])


def test_groups_make_no_difference(monkeypatch):
    x = torch.randn(5, 3000)
    observer = HistogramObserver(**QScheme(bit=4, is_per_channel=True).observer_params())
    observer(x)
    before = observer.calculate_qparams()
    monkeypatch.setattr(divergence, '_GROUP_NUMEL', 3000)
    assert torch.equal(observer.calculate_qparams()[0], before[0])


def test_least_error_is_that_of_the_other_observer():
    batches = [torch.randn(20000) * s for s in (1, 2)]
    for scheme in (QScheme(bit=4), QScheme(bit=4, is_symmetry=False)):
        one = HistogramObserver(**scheme.observer_params(), objective='mse', p=2.4, max_samples=10000)
        other = MSEObserver(**scheme.observer_params(), p=2.4, max_samples=10000)
        for x in batches:
            one(x)
            other(x)
        assert torch.equal(one.calculate_qparams()[0], other.calculate_qparams()[0])


def test_refused_arguments():
    params = QScheme().observer_params()
    with pytest.raises(ValueError, match="objective: got 'entropy', allowed: 'kl', 'mse'"):
        HistogramObserver(**params, objective='entropy')
    with pytest.raises(ValueError, match="p: got 2.4 with objective='kl'"):
        HistogramObserver(**params, p=2.4)
    with pytest.raises(ValueError, match='bins: got 1'):
        HistogramObserver(**params, bins=1)
