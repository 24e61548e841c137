"""Time captured networks, with all quantizers disabled, against the networks' own forward.

Weights and images are random; the two forwards of a network take turns, and each ratio is the median over the rounds.

    python tools/benchmarks/capture.py
    python tools/benchmarks/capture.py --models yolox-nano --rounds 21

The last line is JSON: {"resnet20": ..., "mobilenet-v2": ..., "yolox-nano": ..., "swin-tiny": ...}.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable

import common
import torch
from mmengine.registry import DefaultScope
from torch import Tensor, nn

from mmrazor_quant.engine.launch import register_codebase
from mmrazor_quant.registry import MODELS

MODELS_AND_SHAPES = {
    'resnet20': ('benchmark/resnet20_w8a8_cifar10.py', (64, 3, 32, 32)),
    'mobilenet-v2': ('benchmark/mobilenet-v2_w8a8_imagenet650.py', (8, 3, 224, 224)),
    'yolox-nano': ('benchmark/yolox-nano_w8a8_coco94.py', (4, 3, 416, 416)),
    'swin-tiny': ('swin-tiny_w8a8_in1k.py', (4, 3, 224, 224)),
}
"""Config in ``configs/ptq``, and shape (batch, channels, height, width) of its images."""


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--models', nargs='+', choices=list(MODELS_AND_SHAPES), default=list(MODELS_AND_SHAPES))
    parser.add_argument('--rounds', type=int, default=15, help='rounds to take the medians of, at least 5')
    parser.add_argument('--threads', type=int, default=common.count_cores(), help='threads; default: one a core')
    common.add_device(parser)
    args = parser.parse_args()
    if args.rounds < 5 or args.threads < 1:
        parser.error('--rounds takes 5 or more, --threads 1 or more')
    return args


def make_jobs(config: str, shape: tuple[int, ...], device: torch.device) -> dict[str, Callable[[], object]]:
    """Build a network twice, once captured; returns their forwards on the same images."""
    cfg = common.load_config(common.CONFIGS / 'ptq' / config, random=True)
    register_codebase(cfg.default_scope)
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        eager = common.load_float(cfg)
        captured = MODELS.build(cfg.model).eval()
    images = torch.randn(shape, device=device)
    for network in (eager, captured):
        network.to(device)
    return {'float': lambda: forward(eager, images), 'captured': lambda: forward(captured, images)}


@torch.no_grad()
def forward(network: nn.Module, images: Tensor) -> None:
    """Run images through a network, without post-processing."""
    network(images, mode='tensor')


def main() -> None:
    """Run the benchmark."""
    args = parse_args()
    common.set_up('capture', args.threads)
    ratios = {}
    where = common.describe(args.device, args.threads)
    for name in args.models:
        config, shape = MODELS_AND_SHAPES[name]
        print(f'{name}, images of shape {shape}, {where}, {args.rounds} rounds', flush=True)
        jobs = make_jobs(config, shape, args.device)
        ratios[name] = common.summarize(common.measure(jobs, args.rounds, device=args.device))['captured']
    print(json.dumps(ratios))


if __name__ == '__main__':
    main()
