"""Calibrate, train and resume the toy on several ranks without an accelerator: ``torchrun distributed_run.py DIR``."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from mmengine.runner import Runner
from toy import config

from mmrazor_quant.engine.launch import leave_process_group

WRAPPER = {'type': 'MMDistributedDataParallel', 'device_ids': None, 'broadcast_buffers': False}


STEPS = [{'type': f'mmrazor.{name}'} for name in ('CrossLayerEqualization', 'WeightRangeMSE', 'BiasCorrection')]


def run(folder: Path, name: str, task: str = 'train', **changes) -> None:
    """Run QAT or PTQ; each rank saves what it ends with."""
    cfg = config(folder / name, launcher='pytorch', model_wrapper_cfg=WRAPPER, **changes)
    runner = Runner.from_cfg(cfg)
    getattr(runner, task)()
    torch.save(runner.model.module.state_dict(), folder / f'{name}_{dist.get_rank()}.pth')


def main() -> None:
    folder = Path(sys.argv[1])
    dist.init_process_group('gloo')
    torch.set_num_threads(1)
    run(folder, 'ptq', 'test')
    run(folder, 'steps', 'test', test_cfg__extra_steps=STEPS, model__quantizer__qconfig={'w_qscheme': {'bit': 3}})
    run(folder, 'qat', train_cfg__max_epochs=3)
    run(folder, 'resumed', train_cfg__max_epochs=3, load_from=str(folder / 'qat' / 'epoch_2.pth'), resume=True)
    leave_process_group()


if __name__ == '__main__':
    main()
