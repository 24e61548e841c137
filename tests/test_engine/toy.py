"""A tiny classifier, tiny data in memory, and configs of whole runs, for the tests of loops and tools."""

from __future__ import annotations

import copy
import random

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import BaseDataset
from mmengine.evaluator import BaseMetric
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, METRICS, MODELS, TRANSFORMS
from mmengine.structures import BaseDataElement
from torch import nn

from mmrazor_quant.algorithms import GeneralQuant

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
    """What a model takes."""

    def __call__(self, results: dict) -> dict:
        sample = BaseDataElement(metainfo={'label': results['label'], 'augmented': results.get('augmented', False)})
        return {'inputs': torch.from_numpy(results['inputs']), 'data_samples': sample}


class ToyBackbone(nn.Module):
    """Convolution, batch norm, dropout."""

    def __init__(self, dropout: float = 0.2) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.dropout = nn.Dropout(dropout)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.bn(self.conv(inputs)))
        return self.dropout(nn.functional.adaptive_avg_pool2d(x, 4).flatten(1))


@MODELS.register_module(force=True)
class ToyNet(BaseModel):
    """A classifier as OpenMMLab models are."""

    def __init__(self, data_preprocessor: dict | None = None, dropout: float = 0.2) -> None:
        super().__init__(data_preprocessor)
        self.backbone = ToyBackbone(dropout)
        self.head = nn.Linear(8 * 16, CLASSES)

    def forward(self, inputs, data_samples=None, mode='tensor'):
        return getattr(self, 'logits' if mode == 'tensor' else mode)(inputs, data_samples)

    def logits(self, inputs, data_samples=None):
        return self.head(self.backbone(inputs))

    def loss(self, inputs, data_samples):
        labels = torch.tensor([sample.label for sample in data_samples], device=inputs.device)
        return {'loss': nn.functional.cross_entropy(self.logits(inputs), labels)}

    def predict(self, inputs, data_samples):
        for sample, logits in zip(data_samples, self.logits(inputs)):
            sample.set_field(int(logits.argmax()), 'prediction')
        return data_samples


@METRICS.register_module(force=True)
class ToyAccuracy(BaseMetric):
    """Share of images classified right, in percent."""

    default_prefix = 'toy'

    def process(self, data_batch: dict, data_samples: list) -> None:
        self.results.extend(float(sample['prediction'] == sample['label']) for sample in data_samples)

    def compute_metrics(self, results: list) -> dict:
        return {'accuracy': 100 * float(np.mean(results))}


def quant_state(model: GeneralQuant) -> tuple[bool, ...]:
    """Tell what is on: weight observers, weight fake quantizers, and both of the activations."""
    switches = []
    for quantizers in (model.weight_quantizers(), model.act_quantizers()):
        states = {(bool(each.observer_enabled), bool(each.fake_quant_enabled)) for _, each in quantizers}
        assert len(states) == 1, 'all quantizers of a kind are in the same state'
        switches.extend(states.pop())
    return tuple(switches)


def act_scales(model: GeneralQuant) -> torch.Tensor:
    """Give a copy of the scales of all activations."""
    return torch.cat([quantizer.scale.clone() for _, quantizer in model.act_quantizers()])


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
    'model': {
        'type': 'mmrazor.GeneralQuant',
        'architecture': {'type': 'ToyNet'},
        'quantizer': {'type': 'mmrazor.CustomQuantizer'},
        'input_shape': (3, 8, 8),
    },
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
