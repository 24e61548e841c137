"""What the benchmarks share: networks and images of the benchmark configs, jobs timed in turns."""

from __future__ import annotations

import argparse
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
from mmengine.runner import load_checkpoint  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from mmrazor_quant.algorithms import GeneralQuant  # noqa: E402
from mmrazor_quant.engine.memory import keep_freed_memory  # noqa: E402
from mmrazor_quant.registry import MODELS  # noqa: E402

CONFIGS = Path(__file__).resolve().parents[2] / 'configs'


class OnTensors(GeneralQuant):
    """A model whose test step is its forward: neither preprocessing nor data samples are in the times."""

    def test_step(self, data: Tensor) -> Tensor:
        """Run a batch of preprocessed images."""
        return self(data)


def count_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add the option ``--device`` to a command line."""
    parser.add_argument('--device', type=_device, default='cpu', help='cpu (default) or a GPU, such as cuda')


def _device(text: str) -> torch.device:
    try:
        return torch.empty(0, device=text).device
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f'torch has no device {text!r} here') from error


def set_up(name: str, threads: int) -> None:
    """Set the number of threads, keep memory as training does, register mmcls, and let only errors be logged.

    Args:
        name: Name of the benchmark's logger.
        threads: Threads of torch.
    """
    torch.set_num_threads(threads)
    keep_freed_memory()
    MMLogger.get_instance(name, log_level='ERROR')
    register_all_modules(init_default_scope=False)


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
    """Build the float network of a config, untouched by quantization, in eval mode."""
    network = MODELS.build(cfg.model.architecture)
    if cfg.model.float_checkpoint is not None:
        load_checkpoint(network, cfg.model.float_checkpoint, map_location='cpu')
    return network.eval()


def load_images(cfg: Config, network: nn.Module, count: int, random: bool) -> Tensor:
    """Load and preprocess training images.

    Args:
        cfg: Config with the data.
        network: Network with their preprocessor.
        count: Number of images.
        random: Whether to make up images instead.

    Returns:
        Float images, shape [count, 3, 32, 32].
    """
    if random:
        return torch.randn(count, 3, 32, 32)
    dataset = DATASETS.build(dict(cfg.train_dataloader.dataset, pipeline=cfg.test_pipeline))
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))[:count].tolist()
    return network.data_preprocessor(default_collate([dataset[i] for i in order]))['inputs']


def measure(
    jobs: dict[str, Callable[[], object]],
    rounds: int,
    warm_up: int = 2,
    settle: float = 0.0,
    device: torch.device | None = None,
) -> dict[str, list[float]]:
    """Time all jobs in turns.

    Args:
        jobs: What to time, by name.
        rounds: How often.
        warm_up: Runs of each before, to compile and to fill caches.
        settle: Seconds to wait before each turn, after which there is a run that is not timed: threads of a job may go
            on waiting actively for a while after it.
        device: What the jobs run on, if not the CPU; the clock is stopped when it has done all of a job.

    Returns:
        Seconds by job and round.
    """
    for job in jobs.values():
        for _ in range(warm_up):
            job()
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(rounds):
        for name, job in jobs.items():
            if settle:
                time.sleep(settle)
                job()
            wait_for(device)
            start = time.perf_counter()
            job()
            wait_for(device)
            seconds[name].append(time.perf_counter() - start)
    return seconds


def describe(device: torch.device, threads: int) -> str:
    """Return what there is to say of where a benchmark runs."""
    return f'{threads} threads' if device.type == 'cpu' else f'{device}, {torch.cuda.get_device_name(device)}'


def wait_for(device: torch.device | None) -> None:
    """Wait until a device, if there is one beside the CPU, has done all that it was told to."""
    if device is not None and device.type != 'cpu':
        torch.accelerator.synchronize(device)


def summarize(seconds: dict[str, list[float]]) -> dict[str, float]:
    """Print a table; returns the median ratio of each job to the job ``float`` of the same round."""
    ratios = {
        name: statistics.median(mine / base for mine, base in zip(times, seconds['float']))
        for name, times in seconds.items()
    }
    print(f'{"":10s}{"median ms":>12s}{"min ms":>10s}{"max ms":>10s}{"/ float":>10s}')
    for name, times in seconds.items():
        milliseconds = [1000 * each for each in (statistics.median(times), min(times), max(times))]
        print(f'{name:10s}{milliseconds[0]:12.1f}{milliseconds[1]:10.1f}{milliseconds[2]:10.1f}{ratios[name]:10.3f}')
    return {name: round(ratio, 3) for name, ratio in ratios.items() if name != 'float'}
