"""Train the toy with learned scales that start from a batch, on several ranks: ``torchrun FILE DIR``."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from mmengine.runner import Runner
from toy import config

from mmrazor_quant.engine.launch import leave_process_group

WRAPPER = {'type': 'MMDistributedDataParallel', 'device_ids': None, 'broadcast_buffers': False}
QCONFIG = {
    'w_fake_quant': {'type': 'mmrazor.LSQFakeQuantize'},
    'a_fake_quant': {'type': 'mmrazor.LSQPlusFakeQuantize'},
}


def main() -> None:
    folder = Path(sys.argv[1])
    dist.init_process_group('gloo')
    torch.set_num_threads(1)
    cfg = config(
        folder, launcher='pytorch', model_wrapper_cfg=WRAPPER, model__quantizer__qconfig=QCONFIG,
        train_cfg__act_quant_begin=1, custom_hooks=[{'type': 'EMAHook', 'momentum': 0.1}],
    )  # fmt: skip
    runner = Runner.from_cfg(cfg)
    runner.train()
    torch.save(runner.model.module.state_dict(), folder / f'{dist.get_rank()}.pth')
    leave_process_group()


if __name__ == '__main__':
    main()
