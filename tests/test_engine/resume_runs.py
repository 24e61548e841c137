"""Train the toy in processes that can be killed: ``python resume_runs.py SPECS.json`` runs one after the other.

Each run gets a process of its own, forked after the imports, which take longer than the training. A run kills itself
(SIGKILL, nothing is cleaned up) at the moment that its specification names.
"""

from __future__ import annotations

import json
import os
import signal
import sys

# matplotlib, dynamo and yapf are imported by a run as it goes: imported here, before the fork, each is spared it.
import matplotlib.figure  # noqa: F401
import torch
import torch._dynamo
import yapf  # noqa: F401
from mmengine.hooks import Hook
from mmengine.runner import Runner
from toy import config

from mmrazor_quant.engine.checkpoint import find_resumable_checkpoint


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class KillAt(Hook):
    """Kill the process after the given number of iterations."""

    def __init__(self, iteration: int) -> None:
        self.iteration = iteration

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        if runner.iter + 1 == self.iteration:
            die()


class KillInVal(Hook):
    """Kill the process in the middle of the n-th validation."""

    def __init__(self, number: int) -> None:
        self.number = number

    def after_val_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        self.number -= batch_idx == 0
        if self.number == 0 and batch_idx == 1:
            die()


def kill_while_writing(number: int) -> None:
    """Kill the process while the n-th checkpoint is half written."""
    fsync = os.fsync
    count = [0]

    def fsync_or_die(descriptor: int) -> None:
        count[0] += 1
        if count[0] == number:
            os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
            die()
        fsync(descriptor)

    os.fsync = fsync_or_die


def run(spec: dict) -> None:
    """Train once."""
    torch.set_num_threads(1)
    cfg = config(spec['work_dir'], **spec['changes'])
    if spec.get('resume'):
        cfg.load_from = find_resumable_checkpoint(cfg.work_dir)
        cfg.resume = cfg.load_from is not None
        print('resumes from', cfg.load_from, flush=True)
    if 'seed_of' in spec:
        cfg.randomness.seed = torch.load(spec['seed_of'], weights_only=True)['meta']['seed']
    runner = Runner.from_cfg(cfg)
    kill = spec.get('kill', {})
    if 'iteration' in kill:
        runner.register_hook(KillAt(kill['iteration']))
    if 'val' in kill:
        runner.register_hook(KillInVal(kill['val']))
    if 'writing' in kill:
        kill_while_writing(kill['writing'])
    runner.train()


def main() -> None:
    with open(sys.argv[1]) as file:
        specs = json.load(file)
    for spec in specs:
        process = os.fork()
        if process == 0:
            run(spec)
            sys.stdout.flush()
            os._exit(0)
        status = os.waitpid(process, 0)[1]
        print(json.dumps({'work_dir': spec['work_dir'], 'code': os.waitstatus_to_exitcode(status)}), flush=True)


if __name__ == '__main__':
    main()
