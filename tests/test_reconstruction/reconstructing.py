"""A small quantized network on tensors, and short ways to reconstruct it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from small_models import calibrate, images, trained
from torch import Tensor, nn

from mmrazor_quant.algorithms import GeneralQuant
from mmrazor_quant.registry import TASK_UTILS


class Block(nn.Module):
    """A residual block with batch norms."""

    def __init__(self, channels: int, groups: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, groups=groups, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x
        return F.relu(out, inplace=True)


class Small(nn.Module):
    """Two islands with code of its own between them."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), Block(8), Block(8, groups=8))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.backbone(x)
        if bool(x.isnan().any()):  # depends on data: no graph has it
            raise ValueError('NaN')
        return self.head(x.mean((2, 3)))


class OnTensors(GeneralQuant):
    """A model whose test step is its forward."""

    def test_step(self, data: Tensor) -> Tensor:
        return self(data)


def qconfig(w: int = 2, a: int = 4, act: str = 'QDropFakeQuantize', weight: str = 'AdaRoundFakeQuantize') -> dict:
    """A qconfig whose rounding, and activation steps, can be learned."""
    return dict(
        w_observer=dict(type='mmrazor.MSEObserver', p=2.4),
        a_observer=dict(type='mmrazor.MinMaxObserver'),
        w_fake_quant=dict(type=f'mmrazor.{weight}'),
        a_fake_quant=dict(type=f'mmrazor.{act}'),
        w_qscheme=dict(bit=w, is_symmetry=False, is_per_channel=True),
        a_qscheme=dict(bit=a, is_symmetry=False),
    )


def make_model(config: dict | None = None, network: type[nn.Module] = Small) -> OnTensors:
    """A quantized network with the weights of seed 0, not calibrated."""
    torch.manual_seed(0)
    quantizer = dict(type='mmrazor.CustomQuantizer', qconfig=config or qconfig())
    return OnTensors(trained(network()), quantizer, input_shape=(3, 8, 8)).eval()


def batches(count: int = 4, size: int = 8) -> list[Tensor]:
    """Calibration images whose neighbouring pixels are alike: on noise, rounding to nearest is the best there is."""
    coarse = [images(size, (3, 3, 3), seed=i) for i in range(count)]
    return [F.interpolate(x, (8, 8), mode='bilinear') + 0.5 + 0.05 * images(size, seed=9) for x in coarse]


def calibrated(config: dict | None = None, network: type[nn.Module] = Small, data: list | None = None) -> OnTensors:
    """A calibrated network."""
    return calibrate(make_model(config, network), *(batches() if data is None else data))


def reconstruct(model: OnTensors, folder: Any, method: str = 'QDrop', data: list | None = None, **settings: Any):
    """Reconstruct a model; returns the method."""
    settings = {'iters': 60, 'batch_size': 16, **settings}
    built = TASK_UTILS.build(dict(type=f'mmrazor.{method}', **settings))
    built.run(model, batches() if data is None else data, folder)
    return built


def same_state(one: nn.Module, other: nn.Module) -> bool:
    """Tell whether two models have the same state, bit by bit."""
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
