"""Run by test_reduction in two processes, which observe halves of the same data and write what they know after each."""

from __future__ import annotations

import os
import sys

import torch
import torch.distributed as dist

from mmrazor_quant.engine.launch import leave_process_group
from mmrazor_quant.observers import (
    EMAMinMaxObserver,
    EMAMSEObserver,
    EMAPercentileObserver,
    FixedRangeObserver,
    HistogramObserver,
    LSQObserver,
    LSQPlusObserver,
    MinMaxObserver,
    MSEObserver,
    PercentileObserver,
)
from mmrazor_quant.qscheme import QScheme

KINDS = {
    'min_max': (MinMaxObserver, {}),
    'ema_min_max': (EMAMinMaxObserver, {'ema_ratio': 0.7}),
    'mse_values': (MSEObserver, {'exact': True}),
    'mse_histogram': (MSEObserver, {'exact': False, 'p': 2.4, 'max_samples': None}),
    'ema_mse_values': (EMAMSEObserver, {'exact': True}),
    'ema_mse_histogram': (EMAMSEObserver, {'exact': False, 'max_samples': None}),
    'kl': (HistogramObserver, {'max_samples': None}),
    'kl_sampled': (HistogramObserver, {'max_samples': 10000}),
    'histogram_mse': (HistogramObserver, {'objective': 'mse', 'max_samples': None}),
    'percentile': (PercentileObserver, {'percentile': 99.9, 'max_samples': None}),
    'ema_percentile': (EMAPercentileObserver, {'percentile': 99.5}),
    'lsq': (LSQObserver, {}),
    'lsq_plus': (LSQPlusObserver, {}),
    'fixed': (FixedRangeObserver, {'function': 'tanh'}),
}
SCHEMES = {
    'tensor_symmetric': QScheme(bit=4),
    'tensor_asymmetric': QScheme(bit=8, is_symmetry=False),
    'channel_symmetric': QScheme(bit=8, is_per_channel=True, ch_axis=1),
    'channel_asymmetric': QScheme(bit=4, is_symmetry=False, is_per_channel=True, ch_axis=1),
}
NAMES = [(kind, scheme) for kind in KINDS for scheme in SCHEMES]
SIZES = [(0, 200), (150, 250), (300, 0), (0, 0), (60, 200)]
"""Images per batch that each process sees."""


def build(kind: str, scheme: str):
    cls, arguments = KINDS[kind]
    return cls(**SCHEMES[scheme].observer_params(), **arguments)


def batch(step: int, rank: int) -> torch.Tensor:
    """What a process sees, in float16 at times."""
    random = torch.Generator().manual_seed(2 * step + rank)
    x = torch.randn(SIZES[step][rank], 3, 6, 8, generator=random) * (step + 1) + rank
    return x.half() if step == 4 else x


def known(observer) -> dict[str, torch.Tensor]:
    """The statistics and the parameters that follow from them."""
    scale, zero_point = observer.running_qparams()
    return {**{k: v.clone() for k, v in observer.state_dict().items()}, 'scale': scale, 'zero_point': zero_point}


def observe_all(rank: int) -> dict[tuple[str, str], list]:
    found = {}
    for name in NAMES:
        observer = build(*name)
        found[name] = []
        for step in range(len(SIZES)):
            observer(batch(step, rank))
            found[name].append(known(observer))
    return found


def refusals(rank: int) -> list[str]:
    """What each observer says when one process sees NaN, and when none sees anything."""
    found = []
    for kind, scheme in NAMES:
        for x in (torch.tensor([[1.0, float('nan') if rank else 2.0, 3.0]]), torch.empty(0, 3)):
            observer = build(kind, scheme)
            observer(x)
            try:
                observer.calculate_qparams()
                found.append('accepted')
            except ValueError as error:
                found.append(str(error))
    return found


def apart(rank: int) -> dict[tuple[str, str], dict]:
    """What each process knows that observes for itself."""
    found = {}
    for name in NAMES:
        observer = build(*name)
        observer.is_joint = False
        for step in range(len(SIZES) if rank else 1, 0, -1):  # not equally often
            observer(batch(step - 1, rank))
        found[name] = {k: v.clone() for k, v in observer.state_dict().items()}
    return found


def main(rank: int, folder: str) -> None:
    dist.init_process_group('gloo', init_method=f'file://{folder}/init', rank=rank, world_size=2)
    torch.set_num_threads(1)
    found = {'joint': observe_all(rank), 'refusals': refusals(rank), 'apart': apart(rank)}
    torch.save(found, os.path.join(folder, f'{rank}.pt'))
    leave_process_group()


if __name__ == '__main__':
    main(int(sys.argv[1]), sys.argv[2])
