"""QAT of the toy on one process or on several with the same joint batches: ``joint_runs.py DIR``, also by torchrun.

Nothing is random but the order of the images, which is the same for any number of processes.
"""

from __future__ import annotations

import copy
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from mmengine.runner import Runner
from torch import nn
from toy import config, dataloader

from mmrazor_quant.engine.launch import leave_process_group
from mmrazor_quant.fake_quants import FakeQuantize
from mmrazor_quant.graph.batch_fold import quantized_layer_batch_norm
from mmrazor_quant.qscheme import QScheme

WRAPPER = {'type': 'MMDistributedDataParallel', 'device_ids': None, 'broadcast_buffers': False}
LEARNED = {'w_fake_quant': {'type': 'mmrazor.LSQFakeQuantize'}, 'a_fake_quant': {'type': 'mmrazor.LSQPlusFakeQuantize'}}
BITS = {'w_qscheme': {'bit': 4, 'is_per_channel': True}, 'a_qscheme': {'bit': 4, 'is_symmetry': False}}
DELAYED = {'act_quant_begin': 1, 'observe_end': -1, 'calibrate_steps': 0}
RUNS = {
    'observed': ({**BITS, 'a_observer': {'type': 'mmrazor.EMAMinMaxObserver'}}, {}),
    'learned': ({**BITS, **LEARNED}, {'calibrate_steps': 2, 'observe_end': 0}),
    'from_first_batch': ({**BITS, **LEARNED}, {}),
    'delayed': ({**BITS, **LEARNED}, DELAYED),
    'iao': ({}, {}),
}
"""Name, qconfig and schedule of the runs."""

INTEGER_ONLY = {'bn_folding': 'batch', 'quantize_bias': True, 'quantize_add': True}
"""What the run ``iao`` asks of the quantizer."""


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
        model__quantizer={
            'type': 'mmrazor.CustomQuantizer',
            'qconfig': qconfig,
            **(INTEGER_ONLY if name == 'iao' else {}),
        },
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


def run_synchronized(folder: Path) -> None:
    """Fold synchronized batch norms that learn; keep the statistics, also of data far from zero, and mean gradients."""
    world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    torch.manual_seed(0)
    layer, norm = nn.Conv2d(3, 4, 3), nn.SyncBatchNorm(4)
    layer.weight_fake_quant = FakeQuantize(**QScheme(8, is_per_channel=True).observer_params())
    x, target = torch.randn(8, 3, 9, 9), torch.randn(8, 4, 7, 7)
    part = slice(rank * 8 // world, (rank + 1) * 8 // world)
    (quantized_layer_batch_norm(layer, norm, x[part]) - target[part]).square().mean().backward()
    parameters = [*layer.named_parameters(), *norm.named_parameters(prefix='norm')]
    far = copy.deepcopy(norm)
    with torch.no_grad():
        quantized_layer_batch_norm(layer, far, 0.1 * x[part] + 50)
    found = {**norm.state_dict(prefix='norm.'), **far.state_dict(prefix='far.')}
    for name, p in parameters:
        if world > 1:
            dist.all_reduce(p.grad)
        found[f'{name} gradient'] = p.grad / world
    torch.save(found, folder / f'synchronized_{world}_{rank}.pth')


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    if 'WORLD_SIZE' in os.environ:
        dist.init_process_group('gloo')
    for name in RUNS:
        run(folder, name)
    run(folder, 'learned', resume=True)
    run_synchronized(folder)
    if dist.is_initialized():
        leave_process_group()


if __name__ == '__main__':
    main()
