"""A tiny classifier, tiny data in memory, and configs of whole runs, for the tests of loops and tools."""

from __future__ import annotations

import copy
import random

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import BaseDataset
from mmengine.evaluator import BaseMetric
from mmengine.model import BaseDataPreprocessor, BaseModel
from mmengine.registry import DATASETS, METRICS, MODELS, TRANSFORMS
from torch import nn

from mmrazor_quant.fake_quants import FakeQuantize
from mmrazor_quant.observers import MinMaxObserver

CLASSES = 4


@DATASETS.register_module(force=True)
class ToyImages(BaseDataset):
    """Images of 8x8 whose class is the quadrant that is bright, sorted by class."""

    METAINFO = {'classes': tuple('abcd')}

    def __init__(self, size: int = 32, seed: int = 0, scale: float = 1.0, file: str | None = None, **kwargs) -> None:
        self.size, self.seed, self.scale, self.file = size, seed, scale, file
        super().__init__(serialize_data=False, **kwargs)

    def load_data_list(self) -> list[dict]:
        if self.file is not None:
            open(self.file).close()
        generator = np.random.default_rng(self.seed)
        labels = np.arange(self.size) * CLASSES // max(self.size, 1)
        items = []
        for label in labels:
            image = generator.normal(size=(3, 8, 8)).astype(np.float32) * 0.3
            row, column = divmod(int(label), 2)
            image[:, row * 4 : row * 4 + 4, column * 4 : column * 4 + 4] += 1
            items.append({'inputs': image * self.scale, 'label': int(label)})
        return items


@TRANSFORMS.register_module(force=True)
class ToyNoise:
    """Random augmentation that draws from all three generators."""

    def __call__(self, results: dict) -> dict:
        noise = np.random.normal(size=(3, 8, 8)).astype(np.float32) * random.random() * torch.rand(1).item()
        return dict(results, inputs=results['inputs'] + noise, augmented=True)


@TRANSFORMS.register_module(force=True)
class ToyPack:
    """What a data preprocessor takes."""

    def __call__(self, results: dict) -> dict:
        return {
            'inputs': torch.from_numpy(results['inputs']),
            'label': torch.tensor(results['label']),
            'augmented': results.get('augmented', False),
        }


@MODELS.register_module(force=True)
class ToyNet(BaseModel):
    """Convolution, batch norm, dropout, linear."""

    def __init__(self, data_preprocessor: dict | None = None) -> None:
        super().__init__(data_preprocessor or BaseDataPreprocessor())
        self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.dropout = nn.Dropout(0.2)
        self.fc = nn.Linear(8 * 16, CLASSES)

    def features(self, inputs: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.bn(self.conv(inputs)))
        return self.dropout(nn.functional.avg_pool2d(x, 2).flatten(1))

    def forward(self, inputs, label=None, augmented=None, mode='tensor'):
        inputs = torch.stack(inputs) if isinstance(inputs, (list, tuple)) else inputs
        logits = self.fc(self.features(inputs))
        if mode == 'loss':
            return {'loss': nn.functional.cross_entropy(logits, torch.as_tensor(label))}
        return logits if mode == 'tensor' else list(logits)


@METRICS.register_module(force=True)
class ToyAccuracy(BaseMetric):
    """Share of images classified right, in percent."""

    def process(self, data_batch: dict, data_samples: list) -> None:
        for label, logits in zip(data_batch['label'], data_samples):
            self.results.append(float(logits.argmax() == label))

    def compute_metrics(self, results: list) -> dict:
        return {'accuracy': 100 * float(np.mean(results))}


@MODELS.register_module(force=True)
class ToyQuant(BaseModel):
    """A stand-in for GeneralQuant around :class:`ToyNet`, with the methods that the loops call."""

    def __init__(self, architecture: dict | None = None) -> None:
        super().__init__(BaseDataPreprocessor())
        self.architecture = MODELS.build(architecture or {'type': 'ToyNet'})
        symmetric = {'dtype': torch.qint8, 'qscheme': torch.per_tensor_symmetric, 'quant_min': -128, 'quant_max': 127}
        affine = {'dtype': torch.quint8, 'qscheme': torch.per_tensor_affine, 'quant_min': 0, 'quant_max': 255}
        self.weights = nn.ModuleList(FakeQuantize(MinMaxObserver, **symmetric) for _ in range(2))
        self.acts = nn.ModuleList(FakeQuantize(MinMaxObserver, **affine) for _ in range(2))
        self.register_buffer('calibrated', torch.zeros(1, dtype=torch.uint8))
        self.bn_frozen = False
        self.set_quant_state(False, False, False, False)

    @property
    def is_calibrated(self) -> bool:
        return bool(self.calibrated)

    def mark_calibrated(self) -> None:
        self.calibrated.fill_(1)

    def set_quant_state(
        self, weight_observer=None, weight_fake_quant=None, act_observer=None, act_fake_quant=None
    ) -> None:
        for quantizers, observe, quantize in (
            (self.weights, weight_observer, weight_fake_quant),
            (self.acts, act_observer, act_fake_quant),
        ):
            for quantizer in quantizers:
                if observe is not None:
                    quantizer.enable_observer(observe)
                if quantize is not None:
                    quantizer.enable_fake_quant(quantize)

    def quant_state(self) -> tuple[bool, ...]:
        """Tell the four switches, in the order of :meth:`set_quant_state`."""
        weight, act = self.weights[0], self.acts[0]
        switches = (weight.observer_enabled, weight.fake_quant_enabled, act.observer_enabled, act.fake_quant_enabled)
        return tuple(bool(switch) for switch in switches)

    def reset_observers(self) -> None:
        for quantizer in (*self.weights, *self.acts):
            quantizer.activation_post_process.reset()

    def observe_weights(self) -> None:
        for quantizer, layer in zip(self.weights, (self.architecture.conv, self.architecture.fc)):
            quantizer.activation_post_process.reset()
            quantizer.activation_post_process(layer.weight.detach())
            quantizer.compute_qparams()

    def compute_act_qparams(self) -> None:
        for index, quantizer in enumerate(self.acts):
            try:
                quantizer.compute_qparams()
            except ValueError as error:
                raise ValueError(f'acts.{index}: {error}') from error

    def freeze_bn(self, frozen: bool = True) -> None:
        self.bn_frozen = frozen
        self.train(self.training)

    def train(self, mode: bool = True):
        super().train(mode)
        if self.bn_frozen:
            self.architecture.bn.eval()
        return self

    def forward(self, inputs, label=None, augmented=None, mode='tensor'):
        net = self.architecture
        inputs = torch.stack(inputs) if isinstance(inputs, (list, tuple)) else inputs
        conv = nn.functional.conv2d(self.acts[0](inputs), self.weights[0](net.conv.weight), padding=1)
        x = nn.functional.avg_pool2d(torch.relu(net.bn(conv)), 2).flatten(1)
        logits = nn.functional.linear(self.acts[1](net.dropout(x)), self.weights[1](net.fc.weight), net.fc.bias)
        if mode == 'loss':
            return {'loss': nn.functional.cross_entropy(logits, torch.as_tensor(label))}
        return logits if mode == 'tensor' else list(logits)


def dataloader(shuffle: bool, augment: bool, sampler: str = 'DefaultSampler', workers: int = 0, **dataset) -> dict:
    """Config of a dataloader over :class:`ToyImages`."""
    pipeline = [{'type': 'ToyNoise'}] * augment + [{'type': 'ToyPack'}]
    return {
        'batch_size': 8,
        'num_workers': workers,
        'sampler': {'type': sampler, 'shuffle': shuffle},
        'dataset': {'type': 'ToyImages', 'pipeline': pipeline, **dataset},
        'collate_fn': {'type': 'default_collate'},
    }


BASE = {
    'model': {'type': 'ToyQuant', 'architecture': {'type': 'ToyNet'}},
    'train_dataloader': dataloader(shuffle=True, augment=True),
    'val_dataloader': dataloader(shuffle=False, augment=False, seed=1),
    'test_dataloader': dataloader(shuffle=False, augment=False, seed=1),
    'val_evaluator': {'type': 'ToyAccuracy'},
    'test_evaluator': {'type': 'ToyAccuracy'},
    'train_cfg': {'type': 'mmrazor.QATEpochBasedLoop', 'max_epochs': 2},
    'val_cfg': {},
    'test_cfg': {'type': 'mmrazor.PTQLoop', 'calibrate_steps': 3},
    'optim_wrapper': {'optimizer': {'type': 'SGD', 'lr': 0.05, 'momentum': 0.9}},
    'param_scheduler': {'type': 'CosineAnnealingLR', 'T_max': 4},
    'randomness': {'seed': 0},
    'log_level': 'INFO',
}


def config(work_dir, **changes) -> Config:
    """Config of a whole run; a key such as ``train_cfg__max_epochs`` changes one field.

    Args:
        work_dir: Work directory.
        **changes: Top-level entries, or ``__``-separated paths, to set.

    Returns:
        The config.
    """
    cfg = Config({**copy.deepcopy(BASE), 'work_dir': str(work_dir)})
    cfg.experiment_name = f'toy_{random.SystemRandom().getrandbits(40)}'
    for path, value in changes.items():
        *parents, last = path.split('__')
        node = cfg
        for parent in parents:
            node = node[parent]
        node[last] = value
    return cfg
