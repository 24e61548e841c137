"""QAT of the toy on one process or on several with the same joint batches: ``joint_runs.py DIR``, also by torchrun.

Nothing is random but the order of the images, which is the same for any number of processes.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from mmengine.runner import Runner
from toy import config, dataloader

from mmrazor_quant.engine.launch import leave_process_group

WRAPPER = {'type': 'MMDistributedDataParallel', 'device_ids': None, 'broadcast_buffers': False}
LEARNED = {'w_fake_quant': {'type': 'mmrazor.LSQFakeQuantize'}, 'a_fake_quant': {'type': 'mmrazor.LSQPlusFakeQuantize'}}
BITS = {'w_qscheme': {'bit': 4, 'is_per_channel': True}, 'a_qscheme': {'bit': 4, 'is_symmetry': False}}
DELAYED = {'act_quant_begin': 1, 'observe_end': -1, 'calibrate_steps': 0}
RUNS = {
    'observed': ({**BITS, 'a_observer': {'type': 'mmrazor.EMAMinMaxObserver'}}, {}),
    'learned': ({**BITS, **LEARNED}, {'calibrate_steps': 2, 'observe_end': 0}),
    'from_first_batch': ({**BITS, **LEARNED}, {}),
    'delayed': ({**BITS, **LEARNED}, DELAYED),
}
"""Name, qconfig and schedule of the runs."""


def run(folder: Path, name: str, resume: bool = False) -> None:
    """Train three epochs; or resume after the second."""
    qconfig, schedule = RUNS[name]
    world = int(os.environ.get('WORLD_SIZE', 1))
    loader = dataloader(shuffle=True, augment=False)
    loader['batch_size'] = 8 // world
    changes = {f'train_cfg__{key}': value for key, value in schedule.items()}
    if world > 1:
        changes.update(launcher='pytorch', model_wrapper_cfg=WRAPPER)
    if resume:
        changes.update(load_from=str(folder / f'{name}_{world}' / 'epoch_2.pth'), resume=True)
    suffix = '_resumed' if resume else ''
    cfg = config(
        folder / f'{name}_{world}{suffix}',
        train_dataloader=loader,
        model__architecture={'type': 'ToyNet', 'dropout': 0.0},
        model__quantizer={'type': 'mmrazor.CustomQuantizer', 'qconfig': qconfig},
        optim_wrapper={
            'constructor': 'mmrazor.QuantOptimWrapperConstructor',
            'optimizer': {'type': 'SGD', 'lr': 0.05, 'momentum': 0.9, 'weight_decay': 1e-3},
        },
        train_cfg__max_epochs=3,
        train_cfg__freeze_bn_begin=0,
        **changes,
    )
    runner = Runner.from_cfg(cfg)
    runner.train()
    model = runner.model.module if world > 1 else runner.model
    rank = dist.get_rank() if world > 1 else 0
    torch.save(model.state_dict(), folder / f'{name}_{world}_{rank}{suffix}.pth')


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    if 'WORLD_SIZE' in os.environ:
        dist.init_process_group('gloo')
    for name in RUNS:
        run(folder, name)
    run(folder, 'learned', resume=True)
    if dist.is_initialized():
        leave_process_group()


if __name__ == '__main__':
    main()
