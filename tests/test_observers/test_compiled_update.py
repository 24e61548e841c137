"""An observer's update compiled into one call does what its methods do one by one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mmrazor_quant import ops
from mmrazor_quant.observers import EMAMinMaxObserver, ExtremesObserver, MinMaxObserver
from mmrazor_quant.qscheme import QScheme

SCHEMES = {
    'asymmetric': dict(bit=4, is_symmetry=False),
    'symmetric': dict(bit=8),
    'per channel': dict(bit=3, is_per_channel=True),
    'power of two': dict(bit=4, is_pot_scale=True),
    'wide': dict(bit=32, is_symmetry=False),
}


def batches(count: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(6, 50, generator=generator) * (i + 1) - i for i in range(count)]


def follow_all(observer: ExtremesObserver, dtype: torch.dtype) -> list[Tensor]:
    found = [v for batch in batches() for v in observer.follow(batch.to(dtype))]
    return [*found, *observer.state_dict().values()]


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16])
@pytest.mark.parametrize('scheme', SCHEMES)
@pytest.mark.parametrize('kind', [MinMaxObserver, EMAMinMaxObserver])
def test_follows_as_one_by_one(compile_at_once, kind, scheme, dtype):
    params = QScheme(**SCHEMES[scheme]).observer_params()
    found = follow_all(kind(**params), dtype)
    with ops.eager_mode():
        expected = follow_all(kind(**params), dtype)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
        assert a.dtype == b.dtype


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_bad_data_are_noticed_later(compile_at_once, value):
    observer = MinMaxObserver(**QScheme().observer_params())
    observer.follow(torch.tensor([1.0, value]))
    with pytest.raises(ValueError, match='NaN or infinite'):
        observer.calculate_qparams()


def test_what_a_subclass_overrides_counts(compile_at_once):
    class Twice(MinMaxObserver):
        def observed_range(self) -> tuple[Tensor, Tensor]:
            return 2 * self.min_val, 2 * self.max_val

    params = QScheme(bit=8).observer_params()
    scales = [kind(**params).follow(torch.tensor([-1.0, 1.0]))[0] for kind in (MinMaxObserver, Twice)]
    torch.testing.assert_close(scales[1], 2 * scales[0])


def test_hooks_of_an_observer_are_called(compile_at_once):
    observer, seen = MinMaxObserver(**QScheme().observer_params()), []
    observer.register_forward_hook(lambda *_: seen.append(1))
    observer.follow(torch.ones(3))
    assert seen == [1]


def test_empty_data_change_nothing(compile_at_once):
    observer = EMAMinMaxObserver(**QScheme().observer_params())
    before = {name: value.clone() for name, value in observer.state_dict().items()}
    observer.follow(torch.ones(0))
    assert all(torch.equal(value, before[name]) for name, value in observer.state_dict().items())
