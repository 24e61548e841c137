"""Accuracy and time of reconstruction, in units of the float training of the same network, measured in the same run.

    python tools/benchmarks/reconstruction.py --model resnet20 --bits 2/4 --method qdrop --iters 300

U is the time of 300 iterations of float forward and backward of the whole network on batches of 64. Compiling, which
happens once a machine, is done before the clock starts. First and last layer have 8 bits. The last line is JSON:
{"top1": ..., "calibration_U": ..., "reconstruction_U": ...}; with several seeds, their means.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import common
import torch
from mmcls.registry import DATASETS
from mmengine.config import Config
from mmengine.dataset import default_collate
from mmengine.registry import DefaultScope
from torch import Tensor, nn

from mmrazor_quant.algorithms import GeneralQuant
from mmrazor_quant.engine.calibration import calibrate, set_quantized
from mmrazor_quant.registry import TASK_UTILS

MODELS = {'resnet20': common.CONFIGS / 'ptq' / 'benchmark' / 'resnet20_w4a4_cifar10.py'}
METHODS = {'adaround': 'mmrazor.AdaRound', 'brecq': 'mmrazor.BRECQ', 'qdrop': 'mmrazor.QDrop'}
BATCH_SIZE, U_ITERATIONS = 64, 300
EIGHT = dict(w_qscheme=dict(bit=8), a_qscheme=dict(bit=8))


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', choices=sorted(MODELS), default='resnet20', help='network')
    parser.add_argument('--bits', default='2/4', help='bits of weights and activations')
    parser.add_argument('--method', choices=[*METHODS, 'nearest'], default='qdrop', help='nearest: calibration only')
    parser.add_argument('--iters', type=int, default=300, help='iterations a unit')
    parser.add_argument('--fast', action='store_true', help='the documented fast preset, instead of --iters')
    parser.add_argument('--seeds', type=int, default=1, help='runs of different seeds to take the means of')
    parser.add_argument('--images', type=int, default=1024, help='images to calibrate on')
    parser.add_argument('--test-images', type=int, default=None, help='images to evaluate on; default: all')
    parser.add_argument('--options', nargs='*', default=[], metavar='KEY=VALUE', help='other settings of the method')
    parser.add_argument('--threads', type=int, default=common.count_cores(), help='threads; default: one a core')
    parser.add_argument('--random', action='store_true', help='random images and weights, where there are no data')
    args = parser.parse_args()
    numbers = (args.iters, args.seeds, args.images, args.threads)
    if min(numbers) < 1:
        parser.error('--iters, --seeds, --images and --threads take 1 or more')
    return args


class OnTensors(GeneralQuant):
    """A model that runs on preprocessed images with their labels."""

    def test_step(self, data: tuple[Tensor, list]) -> Tensor:
        """Run a batch."""
        return self(data[0])

    def data_preprocessor(self, data: tuple[Tensor, list], training: bool) -> dict[str, Any]:
        """Give what the loss takes."""
        return dict(inputs=data[0], data_samples=data[1])


def qconfig(bits: str) -> dict[str, Any]:
    """Make the qconfig: asymmetric weights per channel, asymmetric activations per tensor, MSE ranges of p = 2.4."""
    w, a = map(int, bits.split('/'))
    return dict(
        w_observer=dict(type='mmrazor.MSEObserver', p=2.4),
        a_observer=dict(type='mmrazor.MSEObserver', p=2.4),
        w_fake_quant=dict(type='mmrazor.AdaRoundFakeQuantize'),
        a_fake_quant=dict(type='mmrazor.QDropFakeQuantize'),
        w_qscheme=dict(bit=w, is_symmetry=False, is_per_channel=True),
        a_qscheme=dict(bit=a, is_symmetry=False, is_per_channel=False),
        overrides=[dict(order='first', **EIGHT), dict(order='last', **EIGHT)],
    )


def load(cfg: Config, split: str, count: int | None, network: nn.Module, random: bool) -> list[tuple[Tensor, list]]:
    """Load batches of preprocessed images with their data samples.

    Args:
        cfg: Config with the data.
        split: ``'train'`` (in random order) or ``'test'``.
        count: Number of images; None: all.
        network: Network with the preprocessor.
        random: Whether to make up images instead.

    Returns:
        The batches.
    """
    dataset_cfg = cfg.train_dataloader.dataset if split == 'train' else cfg.test_dataloader.dataset
    if random:
        from mmcls.structures import ClsDataSample

        count = count or BATCH_SIZE
        images, samples = torch.randn(count, 3, 32, 32), [ClsDataSample().set_gt_label(i % 10) for i in range(count)]
    else:
        dataset = DATASETS.build(dict(dataset_cfg, pipeline=cfg.test_pipeline))
        order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0)).tolist()
        batch = network.data_preprocessor(default_collate([dataset[i] for i in order[:count]]))
        images, samples = batch['inputs'], batch['data_samples']
    starts = range(0, len(images), BATCH_SIZE)
    return [(images[i : i + BATCH_SIZE], samples[i : i + BATCH_SIZE]) for i in starts]


def seconds_of(function: Callable[[], object]) -> float:
    """Time a call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def measure_unit(network: nn.Module, batch: tuple[Tensor, list], iterations: int) -> float:
    """Return the seconds of an iteration of float forward and backward: the median."""
    network.train()

    def step() -> None:
        network(*batch, mode='loss')['loss'].backward()

    times = [seconds_of(step) for _ in range(iterations + 2)][2:]
    network.eval()
    return statistics.median(times)


@torch.no_grad()
def accuracy(model: nn.Module, batches: list[tuple[Tensor, list]]) -> float:
    """Return the share of images classified right, in percent."""
    right = total = 0
    for images, samples in batches:
        labels = torch.tensor([int(sample.gt_label.label) for sample in samples])
        right += (model(images).argmax(1) == labels).sum().item()
        total += len(labels)
    return 100.0 * right / total


def parse_options(options: list[str]) -> dict[str, Any]:
    """Read settings given as KEY=VALUE."""
    return {key: json.loads(value.replace("'", '"')) for key, _, value in (option.partition('=') for option in options)}


def main() -> None:
    """Run the benchmark."""
    args = parse_args()
    common.set_up('reconstruction', args.threads)
    with DefaultScope.overwrite_default_scope('mmcls'):
        cfg = common.load_config(MODELS[args.model], args.random)
        network = common.load_float(cfg)
        calibration = load(cfg, 'train', args.images, network, args.random)
        test = load(cfg, 'test', args.test_images, network, args.random)
        fields = {**cfg.model, 'quantizer': dict(type='mmrazor.CustomQuantizer', qconfig=qconfig(args.bits))}
        runs = [run(fields, args, network, calibration, test, seed) for seed in range(args.seeds)]
    for seed, figures in enumerate(runs):
        print(f'seed {seed}: {json.dumps(figures)}')
    print(json.dumps({key: round(statistics.mean(each[key] for each in runs), 3) for key in runs[0]}))


def build_method(args: argparse.Namespace, seed: int, iters: int | None = None) -> Any:
    """Build the reconstruction."""
    fields = dict(FAST) if args.fast else dict(iters=args.iters)
    fields.update(type=METHODS[args.method], seed=seed, **parse_options(args.options))
    if iters is not None:
        fields['iters'] = iters
    return TASK_UTILS.build(fields)


FAST: dict[str, Any] = dict(iters=100)
"""The fast preset of the documentation."""


def run(
    fields: dict[str, Any], args: argparse.Namespace, network: nn.Module, calibration: list, test: list, seed: int
) -> dict[str, float]:
    """Quantize the network once; returns accuracy and times in U."""
    model = OnTensors(**{key: value for key, value in fields.items() if key != 'type'}).eval()

    def calibration_run() -> None:
        calibrate(model, calibration, len(calibration), 'batches')

    calibration_run()  # compiles
    if args.method != 'nearest':
        with tempfile.TemporaryDirectory() as folder:
            build_method(args, seed, iters=2).run(model, calibration, folder)  # compiles
    unit = measure_unit(network, calibration[0], 20)
    times = {'calibration_U': seconds_of(calibration_run), 'reconstruction_U': 0.0}
    if args.method != 'nearest':
        with tempfile.TemporaryDirectory() as folder:
            method = build_method(args, seed)
            times['reconstruction_U'] = seconds_of(lambda: method.run(model, calibration, folder))
            for report in method.reports:
                print(f'{report.unit:28s}{report.before:10.5f} ->{report.after:9.5f}  {report.seconds:6.2f} s')
            budget = method.settings.cache_gib
            limit = 'no budget' if budget is None else f'budget {budget * 1024:.1f} MiB'
            print(f'cached activations: at most {method.cache_peak / 2**20:.1f} MiB in memory ({limit})')
    unit = (unit + measure_unit(network, calibration[0], 20)) / 2 * U_ITERATIONS
    set_quantized(model)
    times = {key: round(seconds / unit, 3) for key, seconds in times.items()}
    print(f'U = {unit:.1f} s')
    return {'top1': round(accuracy(model, test), 2), **times}


if __name__ == '__main__':
    main()
