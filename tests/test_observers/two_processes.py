"""Run by test_distributed in two processes: each observes half of the data and writes the parameters."""

from __future__ import annotations

import os
import sys

import torch
import torch.distributed as dist

from mmrazor_quant.observers import EMAMinMaxObserver, MinMaxObserver, MSEObserver
from mmrazor_quant.qscheme import QScheme


def observers() -> dict:
    params = QScheme(bit=4, is_symmetry=False).observer_params()
    return {
        'min_max': MinMaxObserver(**params),
        'ema': EMAMinMaxObserver(**params),
        'mse': MSEObserver(**params, max_samples=None),
        'one_sees_nothing': MinMaxObserver(**params),
        'ema_one_sees_nothing': EMAMinMaxObserver(**params),
    }


def data(rank: int) -> torch.Tensor:
    return torch.randn(20000, generator=torch.Generator().manual_seed(rank)) * (rank + 1)


def main(rank: int, folder: str) -> None:
    dist.init_process_group('gloo', init_method=f'file://{folder}/init', rank=rank, world_size=2)
    torch.set_num_threads(1)
    found = {}
    for name, observer in observers().items():
        if rank == 0 or 'nothing' not in name:
            observer(data(rank))
        found[name] = observer.calculate_qparams()
        assert all(map(torch.equal, found[name], observer.calculate_qparams())), 'nothing is counted twice'
    torch.save(found, os.path.join(folder, f'{rank}.pt'))
    dist.destroy_process_group()


if __name__ == '__main__':
    main(int(sys.argv[1]), sys.argv[2])
