"""Time a float network against the same one in 8-bit integers, on each backend.

    python tools/benchmarks/deployed.py --model resnet50

Both files are of one network, which was quantized for the backend, and take turns in one run; a speedup is the median
over the rounds of the float file's time divided by the quantized one's, for one image at a time. Agreement is the
share of images with the same class as in the fake-quantized network, in PyTorch. ``left_in_float`` counts the layers
that should run in integers by the backend's table and do not.

The last line is JSON: {"onnxruntime": {"speedup": ..., "speedup_2_threads": ..., "size": ..., "agreement": ...,
"left_in_float": ...}, ...}.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import common
import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.registry import DefaultScope
from torch import Tensor, nn

from mmrazor_quant.backends import BACKENDS
from mmrazor_quant.backends.deploy import backend_module, raw_outputs
from mmrazor_quant.backends.intermediate import export_intermediate, without_quantizers
from mmrazor_quant.engine.calibration import calibrate
from mmrazor_quant.engine.deployment import compare, left_in_float, simulated_or_itself
from mmrazor_quant.registry import MODELS

PTQ = common.CONFIGS / 'ptq'
CONFIGS = {
    'resnet20': (PTQ / 'benchmark' / 'resnet20_w8a8_cifar10.py', 32),
    'resnet50': (PTQ / 'resnet50_w8a8_in1k.py', 224),
    'mobilenet-v2': (PTQ / 'mobilenet-v2_w8a8_in1k.py', 224),
}
"""Config, and width and height of an image, by name of the network."""

RUN_HERE = ('onnxruntime', 'openvino', 'ncnn')
"""Backends whose own runtime runs on any CPU."""

_SETTLE = 0.02


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', choices=sorted(CONFIGS), default='resnet50', help='network, with random weights')
    parser.add_argument('--backends', default=','.join(RUN_HERE), help='comma-separated; default: all there are')
    parser.add_argument('--rounds', type=int, default=21, help='rounds to take the medians of')
    parser.add_argument('--images', type=int, default=64, help='images to compare classes on')
    args = parser.parse_args()
    args.backends = args.backends.split(',')
    unknown = sorted(set(args.backends) - set(RUN_HERE))
    if unknown:
        parser.error(f'--backends: unknown {", ".join(unknown)}; allowed: {", ".join(RUN_HERE)}')
    if args.rounds < 1 or args.images < 1:
        parser.error('--rounds and --images take 1 or more')
    return args


def load_network(path: Path) -> tuple[Config, nn.Module]:
    """Load a config; returns it and its float network with random weights."""
    cfg = Config.fromfile(path)
    cfg.model.float_checkpoint = None
    torch.manual_seed(0)
    network = MODELS.build(cfg.model.architecture)
    network.init_weights()
    return cfg, network


def make_images(count: int, size: int) -> Tensor:
    """Make images that differ in what they show, not only in noise; shape [count, 3, size, size]."""
    generator = torch.Generator().manual_seed(0)
    coarse, fine = (torch.randn(count, 3, n, n, generator=generator) for n in (4, size))
    return F.interpolate(coarse, size=(size, size), mode='bicubic') + 0.2 * fine


@torch.no_grad()
def settle_norms(network: nn.Module, images: Tensor) -> None:
    """Let batch norms learn their statistics, without which the values of a random network vanish or explode.

    Their weights begin with 1: residual branches begin with 0, which would take them out of the network.
    """
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.fill_(1.0)
    network.train()
    for _ in range(3):
        for batch in images.split(32):
            network(batch)
    network.eval()


def demanded(backend: str, kind: str) -> dict[str, bool]:
    """Return the fields of a scheme for which a backend takes one value only."""
    limits = BACKENDS[backend].limits(kind)
    values = {name: getattr(limits, name) for name in ('is_symmetry', 'is_per_channel', 'is_symmetric_range')}
    return {name: allowed[0] for name, allowed in values.items() if len(allowed) == 1}


def quantized(cfg: Config, network: nn.Module, backend: str, images: Tensor) -> common.OnTensors:
    """Quantize a copy of a network as a backend runs it, with the ranges of some images."""
    fields = {key: value for key, value in cfg.model.items() if key != 'type'}
    quantizer = copy.deepcopy(fields['quantizer'])
    quantizer.backend = backend
    for kind in 'wa':
        quantizer.qconfig[f'{kind}_qscheme'].update(demanded(backend, kind))
    model = common.OnTensors(**{**fields, 'quantizer': quantizer})
    model.architecture.load_state_dict(network.state_dict(), strict=False)
    batches = list(images.split(16))
    calibrate(model, batches, len(batches), 'images')
    return model


def time_backend(backend: str, model: common.OnTensors, images: Tensor, rounds: int, folder: Path) -> dict[str, Any]:
    """Export a network in integers and in float, and time both files; returns the figures of the backend."""
    exporter, runtime = (backend_module(backend, name) for name in ('exporter', 'runtime'))
    integers = export_intermediate(model, images[:1], raw_outputs)
    files = {}
    for kind, network in (('float', without_quantizers(integers)), ('int8', integers)):
        (folder / kind).mkdir(parents=True)
        files[kind] = exporter.write(network, folder / kind)
    figures: dict[str, Any] = {}
    for threads in (1, 2):
        sessions = {kind: runtime.Session(file, threads) for kind, file in files.items()}
        figures['speedup' + (f'_{threads}_threads' if threads > 1 else '')] = speedup(sessions, images, rounds, threads)
    sizes = {kind: size_of(exporter, file) for kind, file in files.items()}
    figures['size'] = round(sizes['int8'] / sizes['float'], 3)
    network = simulated_or_itself(model, backend)
    figures['agreement'] = compare(network, runtime.Session(files['int8']), images)['argmax']
    found = runtime.layers(files['int8'])
    print(f'layers {found}')
    figures['left_in_float'] = left_in_float(integers, model.quantizer.rules, found)
    return figures


def size_of(exporter: ModuleType, file: Path) -> int:
    """Return the bytes of all files that a network consists of."""
    return sum((file.parent / name).stat().st_size for name in getattr(exporter, 'FILES', (file.name,)))


def speedup(sessions: dict[str, Any], images: Tensor, rounds: int, threads: int) -> float:
    """Time both files, print a line, and return how many times faster the quantized one is."""
    image = images[:1].numpy()
    jobs = {kind: lambda session=session: session(image) for kind, session in sessions.items()}
    seconds = common.measure(jobs, rounds, settle=_SETTLE)
    ratio = statistics.median(base / mine for base, mine in zip(seconds['float'], seconds['int8']))
    medians = {kind: 1000 * statistics.median(times) for kind, times in seconds.items()}
    print(
        f'{threads} thread(s): float {medians["float"]:.2f} ms, int8 {medians["int8"]:.2f} ms, {ratio:.2f} times faster'
    )
    return round(ratio, 3)


def main() -> None:
    """Run the benchmark."""
    args = parse_args()
    common.set_up('deployed', common.count_cores())
    path, size = CONFIGS[args.model]
    figures = {}
    with DefaultScope.overwrite_default_scope('mmcls'), tempfile.TemporaryDirectory() as folder:
        cfg, network = load_network(path)
        images = make_images(args.images, size)
        settle_norms(network, images)
        for backend in args.backends:
            print(f'{args.model} on {backend}, images of {size} x {size}, {args.rounds} rounds')
            model = quantized(cfg, network, backend, images)
            figures[backend] = time_backend(backend, model, images, args.rounds, Path(folder) / backend)
    print(json.dumps(figures))


if __name__ == '__main__':
    main()
