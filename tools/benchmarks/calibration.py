"""Time calibration and fake-quantized evaluation of ResNet-20 against its float forward, on 1,024 CIFAR-10 images.

All figures are of one run: the four jobs take turns, in batches that are in memory already, and each ratio is the
median over the rounds of a job's time divided by that of the float forward in the same round.

    python tools/benchmarks/calibration.py

The last line is JSON: {"minmax": ..., "mse": ..., "evaluate": ...}.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

# Importing the OpenMMLab packages is loud about deprecations in packages that they import.
warnings.filterwarnings('ignore', category=UserWarning)

import torch  # noqa: E402
from mmcls.registry import DATASETS  # noqa: E402
from mmcls.utils import register_all_modules  # noqa: E402
from mmengine.config import Config  # noqa: E402
from mmengine.dataset import default_collate  # noqa: E402
from mmengine.logging import MMLogger  # noqa: E402
from mmengine.registry import DefaultScope  # noqa: E402
from mmengine.runner import load_checkpoint  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from mmrazor_quant.algorithms import GeneralQuant  # noqa: E402
from mmrazor_quant.engine.calibration import calibrate, set_quantized  # noqa: E402
from mmrazor_quant.registry import MODELS  # noqa: E402

CONFIGS = Path(__file__).resolve().parents[2] / 'configs' / 'ptq' / 'benchmark'
MINMAX, MSE = CONFIGS / 'resnet20_w8a8_cifar10.py', CONFIGS / 'resnet20_w4a4_cifar10.py'
BATCH_SIZE = 64


class OnTensors(GeneralQuant):
    """A model whose test step is its forward: neither preprocessing nor data samples are in the times."""

    def test_step(self, data: Tensor) -> Tensor:
        """Run a batch of preprocessed images."""
        return self(data)


def count_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rounds', type=int, default=11, help='rounds to take the medians of, at least 5')
    parser.add_argument('--images', type=int, default=1024, help='number of images')
    parser.add_argument('--threads', type=int, default=count_cores(), help='threads of torch; default: one a core')
    parser.add_argument('--random', action='store_true', help='random images and weights, where there are no data')
    args = parser.parse_args()
    if args.rounds < 5 or args.images < 1 or args.threads < 1:
        parser.error('--rounds takes 5 or more, --images and --threads 1 or more')
    return args


def load_config(path: Path, random: bool) -> Config:
    """Load a config, with random weights if asked for."""
    cfg = Config.fromfile(path)
    if random:
        cfg.model.float_checkpoint = None
    elif not Path(cfg.model.float_checkpoint).is_file():
        raise SystemExit(
            f'no data in {cfg.data_root}: set MMRAZOR_QUANT_DATA to their folder, or give --random for times only'
        )
    return cfg


def load_float(cfg: Config) -> nn.Module:
    """Build the float network, untouched by quantization."""
    network = MODELS.build(cfg.model.architecture)
    if cfg.model.float_checkpoint is not None:
        load_checkpoint(network, cfg.model.float_checkpoint, map_location='cpu')
    return network.eval()


def load_quantized(cfg: Config) -> OnTensors:
    """Build the quantized network of a config."""
    return OnTensors(**{key: value for key, value in cfg.model.items() if key != 'type'})


def load_batches(cfg: Config, network: nn.Module, count: int, random: bool) -> list[Tensor]:
    """Load and preprocess training images.

    Args:
        cfg: Config with the data.
        network: Network with their preprocessor.
        count: Number of images.
        random: Whether to make up images instead.

    Returns:
        Batches of float images, shape [64, 3, 32, 32], the last one maybe smaller.
    """
    if random:
        return list(torch.randn(count, 3, 32, 32).split(BATCH_SIZE))
    dataset = DATASETS.build(dict(cfg.train_dataloader.dataset, pipeline=cfg.test_pipeline))
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))[:count].tolist()
    data = network.data_preprocessor(default_collate([dataset[i] for i in order]))
    return list(data['inputs'].split(BATCH_SIZE))


def make_jobs(batches: list[Tensor], random: bool) -> dict[str, Callable[[], None]]:
    """Build the networks; returns what to time by name, ``float`` first."""
    minmax, mse = (load_quantized(load_config(path, random)) for path in (MINMAX, MSE))
    evaluated = load_quantized(load_config(MINMAX, random))
    calibrate(evaluated, batches, len(batches), 'batches')
    network = load_float(load_config(MINMAX, random))
    return {
        'float': lambda: forward(network, batches),
        'minmax': lambda: calibrate(minmax, batches, len(batches), 'batches'),
        'mse': lambda: calibrate(mse, batches, len(batches), 'batches'),
        'evaluate': lambda: (set_quantized(evaluated), forward(evaluated, batches)),
    }


@torch.no_grad()
def forward(network: nn.Module, batches: list[Tensor]) -> None:
    """Run all images through a network."""
    for batch in batches:
        network(batch)


def measure(jobs: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Time all jobs in turns; returns seconds by job and round."""
    for job in jobs.values():
        for _ in range(2):  # to compile, and to fill caches
            job()
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(rounds):
        for name, job in jobs.items():
            start = time.perf_counter()
            job()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def summarize(seconds: dict[str, list[float]]) -> dict[str, float]:
    """Print a table; returns the ratios to the float forward."""
    ratios = {
        name: statistics.median(mine / base for mine, base in zip(times, seconds['float']))
        for name, times in seconds.items()
    }
    print(f'{"":10s}{"median ms":>12s}{"min ms":>10s}{"max ms":>10s}{"/ float":>10s}')
    for name, times in seconds.items():
        milliseconds = [1000 * each for each in (statistics.median(times), min(times), max(times))]
        print(f'{name:10s}{milliseconds[0]:12.1f}{milliseconds[1]:10.1f}{milliseconds[2]:10.1f}{ratios[name]:10.3f}')
    return {name: round(ratio, 3) for name, ratio in ratios.items() if name != 'float'}


def main() -> None:
    """Run the benchmark."""
    args = parse_args()
    torch.set_num_threads(args.threads)
    MMLogger.get_instance('calibration', log_level='ERROR')
    register_all_modules(init_default_scope=False)
    with DefaultScope.overwrite_default_scope('mmcls'):
        cfg = load_config(MINMAX, args.random)
        batches = load_batches(cfg, load_float(cfg), args.images, args.random)
        jobs = make_jobs(batches, args.random)
    print(f'ResNet-20, {args.images} images in batches of {BATCH_SIZE}, {args.threads} threads, {args.rounds} rounds')
    print(json.dumps(summarize(measure(jobs, args.rounds))))


if __name__ == '__main__':
    main()
