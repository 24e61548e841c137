"""Time a step of quantization-aware training against the float step of the same network, per fake quantizer.

A step is forward, loss, backward and update, with learning batch norms, on images in memory. The steps take turns in
one run; each ratio is the median over the rounds of a step's time divided by that of the float step of the same round.
Memory is the peak of what a step allocates.

    python tools/benchmarks/qat_step.py --model resnet20 --batch 128

The last line is JSON: {"lsq": {"time": ..., "memory": ...}, ...}. MMRAZOR_QUANT_EAGER=1 in the environment shows what
is left without a C++ compiler.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

import common
import torch
from mmcls.structures import ClsDataSample
from mmengine.config import Config
from mmengine.registry import DefaultScope
from torch import Tensor, nn

from mmrazor_quant.algorithms import GeneralQuant
from mmrazor_quant.ops import compiled

MODELS = {'resnet20': common.CONFIGS / 'qat' / 'benchmark' / 'resnet20_w4a4_cifar10.py'}

_BASE = dict(
    w_observer=dict(type='mmrazor.MinMaxObserver'),
    a_observer=dict(type='mmrazor.EMAMinMaxObserver'),
    w_qscheme=dict(is_symmetry=True, is_per_channel=True),
    a_qscheme=dict(is_symmetry=False),
)
_FIRST = dict(order='first', a_fake_quant=dict(type='mmrazor.FakeQuantize'))
"""As in the configs: the range of images is not learned, which would cost a gradient of the images."""

FAKE_QUANTS: dict[str, dict[str, Any]] = {
    'fixed': dict(),
    'lsq': dict(w_fake_quant=dict(type='mmrazor.LSQFakeQuantize'), a_fake_quant=dict(type='mmrazor.LSQFakeQuantize')),
    'lsq_plus': dict(
        w_fake_quant=dict(type='mmrazor.LSQPlusFakeQuantize'), a_fake_quant=dict(type='mmrazor.LSQPlusFakeQuantize')
    ),
    'pact': dict(a_fake_quant=dict(type='mmrazor.PACTFakeQuantize')),
    'dorefa': dict(w_fake_quant=dict(type='mmrazor.DoReFaFakeQuantize')),
    'dsq': dict(w_fake_quant=dict(type='mmrazor.DSQFakeQuantize'), a_fake_quant=dict(type='mmrazor.DSQFakeQuantize')),
    'tqt': dict(
        w_fake_quant=dict(type='mmrazor.TQTFakeQuantize'),
        a_fake_quant=dict(type='mmrazor.TQTFakeQuantize'),
        w_qscheme=dict(is_symmetry=True, is_per_channel=True, is_pot_scale=True),
        a_qscheme=dict(is_symmetry=True, is_pot_scale=True),
    ),
    'dynamic': dict(a_fake_quant=dict(type='mmrazor.DynamicFakeQuantize')),
}
"""What of a qconfig makes each of them; observers are on in all steps."""


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', choices=sorted(MODELS), default='resnet20', help='network')
    parser.add_argument('--batch', type=int, default=128, help='images a step')
    parser.add_argument('--bits', default='4/4', help='bits of weights and activations')
    parser.add_argument('--fake-quants', default=','.join(FAKE_QUANTS), help='which to time, comma-separated')
    parser.add_argument('--rounds', type=int, default=21, help='rounds to take the medians of')
    parser.add_argument('--threads', type=int, default=common.count_cores(), help='threads; default: one a core')
    common.add_device(parser)
    parser.add_argument('--random', action='store_true', help='random images and weights, where there are no data')
    args = parser.parse_args()
    args.fake_quants = args.fake_quants.split(',')
    unknown = sorted(set(args.fake_quants) - set(FAKE_QUANTS))
    if unknown:
        parser.error(f'--fake-quants: unknown {", ".join(unknown)}; allowed: {", ".join(FAKE_QUANTS)}')
    if args.rounds < 1 or args.batch < 1 or args.threads < 1:
        parser.error('--rounds, --batch and --threads take 1 or more')
    return args


def qconfig(fake_quant: str, bits: str) -> dict[str, Any]:
    """Make the qconfig of a fake quantizer: weights per channel, first and last layer 8 bits."""
    w, a = map(int, bits.split('/'))
    fields = {**_BASE, **FAKE_QUANTS[fake_quant]}
    eight = dict(w_qscheme=dict(bit=8), a_qscheme=dict(bit=8))
    return {
        **fields,
        'w_qscheme': dict(bit=w, **fields['w_qscheme']),
        'a_qscheme': dict(bit=a, **fields['a_qscheme']),
        'overrides': [{**_FIRST, **eight}, dict(order='last', **eight)],
    }


def quantized(cfg: Config, fake_quant: str, bits: str) -> nn.Module:
    """Build a network in the state of a training with all observers on."""
    fields = {**cfg.model, 'quantizer': dict(type='mmrazor.CustomQuantizer', qconfig=qconfig(fake_quant, bits))}
    model = GeneralQuant(**{key: value for key, value in fields.items() if key != 'type'})
    model.observe_weights()
    model.set_quant_state(True, True, True, True)
    return model.train()


def make_step(network: nn.Module, images: Tensor) -> Callable[[], None]:
    """Make the function that trains a network for one step, on the device of the images."""
    network.to(images.device).train()
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-4, momentum=0.9)
    labels = [ClsDataSample().set_gt_label(i % 10).to(images.device) for i in range(len(images))]

    def step() -> None:
        loss = network(images, labels, mode='loss')['loss']
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def peak_bytes(step: Callable[[], None], device: torch.device) -> int:
    """Return the peak of what a step has allocated at a time on its device, beyond what there was before."""
    if device.type != 'cpu':
        before = torch.accelerator.memory_allocated(device)
        torch.accelerator.reset_peak_memory_stats(device)
        step()
        return torch.accelerator.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == '[memory]']
    current = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        current += event.nbytes()
        peak = max(peak, current)
    return peak


def main() -> None:
    """Run the benchmark."""
    args = parse_args()
    common.set_up('qat_step', args.threads)
    # At once what training does in its first minute: compiling whatever is called often.
    compiled.switch.patience = 0
    with DefaultScope.overwrite_default_scope('mmcls'):
        cfg = common.load_config(MODELS[args.model], args.random)
        network = common.load_float(cfg)
        images = common.load_images(cfg, network, args.batch, args.random).to(args.device)
        networks = {'float': network, **{name: quantized(cfg, name, args.bits) for name in args.fake_quants}}
        steps = {name: make_step(each, images) for name, each in networks.items()}
    where = common.describe(args.device, args.threads)
    print(f'{args.model}, batches of {args.batch}, W/A {args.bits}, {where}, {args.rounds} rounds')
    times = common.summarize(common.measure(steps, args.rounds, warm_up=4, device=args.device))
    memory = {name: peak_bytes(step, args.device) for name, step in steps.items()}
    figures = {name: {'time': times[name], 'memory': round(memory[name] / memory['float'], 3)} for name in times}
    print(json.dumps(figures))


if __name__ == '__main__':
    main()
