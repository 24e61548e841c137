"""Time calibration and fake-quantized evaluation of ResNet-20 against its float forward, on 1,024 CIFAR-10 images.

All figures are of one run: the four jobs take turns, in batches that are in memory already, and each ratio is the
median over the rounds of a job's time divided by that of the float forward in the same round.

    python tools/benchmarks/calibration.py

The last line is JSON: {"minmax": ..., "mse": ..., "evaluate": ...}.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable

import common
import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope
from torch import Tensor, nn

from mmrazor_quant.engine.calibration import calibrate, set_quantized
from mmrazor_quant.graph.frozen import frozen_weights

MINMAX, MSE = (common.CONFIGS / 'ptq' / 'benchmark' / f'resnet20_{name}_cifar10.py' for name in ('w8a8', 'w4a4'))
BATCH_SIZE = 64


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rounds', type=int, default=11, help='rounds to take the medians of, at least 5')
    parser.add_argument('--images', type=int, default=1024, help='number of images')
    parser.add_argument('--threads', type=int, default=common.count_cores(), help='threads; default: one a core')
    parser.add_argument('--random', action='store_true', help='random images and weights, where there are no data')
    args = parser.parse_args()
    if args.rounds < 5 or args.images < 1 or args.threads < 1:
        parser.error('--rounds takes 5 or more, --images and --threads 1 or more')
    return args


def load_quantized(cfg: Config) -> common.OnTensors:
    """Build the quantized network of a config."""
    return common.OnTensors(**{key: value for key, value in cfg.model.items() if key != 'type'})


def make_jobs(batches: list[Tensor], random: bool) -> dict[str, Callable[[], None]]:
    """Build the networks; returns what to time by name, ``float`` first."""
    minmax, mse = (load_quantized(common.load_config(path, random)) for path in (MINMAX, MSE))
    evaluated = load_quantized(common.load_config(MINMAX, random))
    calibrate(evaluated, batches, len(batches), 'batches')
    network = common.load_float(common.load_config(MINMAX, random))
    return {
        'float': lambda: forward(network, batches),
        'minmax': lambda: calibrate(minmax, batches, len(batches), 'batches'),
        'mse': lambda: calibrate(mse, batches, len(batches), 'batches'),
        'evaluate': lambda: evaluate(evaluated, batches),
    }


def evaluate(model: common.OnTensors, batches: list[Tensor]) -> None:
    """Run all images through a calibrated network, as the loops do for an evaluation."""
    set_quantized(model)
    with frozen_weights(model):
        forward(model, batches)


@torch.no_grad()
def forward(network: nn.Module, batches: list[Tensor]) -> None:
    """Run all images through a network."""
    for batch in batches:
        network(batch)


def main() -> None:
    """Run the benchmark."""
    args = parse_args()
    common.set_up('calibration', args.threads)
    with DefaultScope.overwrite_default_scope('mmcls'):
        cfg = common.load_config(MINMAX, args.random)
        batches = list(common.load_images(cfg, common.load_float(cfg), args.images, args.random).split(BATCH_SIZE))
        jobs = make_jobs(batches, args.random)
    print(f'ResNet-20, {args.images} images in batches of {BATCH_SIZE}, {args.threads} threads, {args.rounds} rounds')
    print(json.dumps(common.summarize(common.measure(jobs, args.rounds))))


if __name__ == '__main__':
    main()
