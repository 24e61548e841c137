"""Reconstruct the small network on several ranks, each with its own images: ``torchrun ... DIR METHOD``."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from reconstructing import batches, make_model, qconfig
from small_models import images

from mmrazor_quant.engine.calibration import calibrate
from mmrazor_quant.engine.launch import leave_process_group
from mmrazor_quant.registry import TASK_UTILS


def main() -> None:
    folder, rank = Path(sys.argv[1]), dist_rank()
    torch.set_num_threads(1)
    mine = batches()[rank::2]
    model = make_model(qconfig())
    calibrate(model, mine, len(mine), 'batches')
    start = {key: value.clone() for key, value in model.state_dict().items()}
    config = dict(type='mmrazor.QDrop', iters=80, batch_size=8, act_lr=1e-2, scale_lr=1e-2)
    reports = TASK_UTILS.build(config).run(model, mine, folder / 'work')
    resumed = make_model(qconfig())
    calibrate(resumed, mine, len(mine), 'batches')
    again = TASK_UTILS.build(config).run(resumed, mine, folder / 'work')
    with torch.no_grad():
        output = model(images(4, seed=7))
    result = dict(start=start, state=model.state_dict(), output=output, losses=[[r.before, r.after] for r in reports])
    # A report that was loaded says how long it took the first time.
    result.update(resumed=resumed.state_dict(), loaded=[r.seconds for r in again] == [r.seconds for r in reports])
    torch.save(result, folder / f'rank_{rank}.pth')
    leave_process_group()


def dist_rank() -> int:
    dist.init_process_group('gloo')
    return dist.get_rank()


if __name__ == '__main__':
    main()
