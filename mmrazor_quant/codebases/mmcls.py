"""What is known of mmcls."""

from __future__ import annotations

from typing import Any

import torch
from mmcls.models import BaseClassifier, BaseRetriever
from mmcls.structures import ClsDataSample
from torch import nn


def owns(model: nn.Module) -> bool:
    """Tells whether the model is one of mmcls."""
    return isinstance(model, (BaseClassifier, BaseRetriever))


def samples(model: nn.Module, shape: tuple[int, ...]) -> list[Any]:
    """Returns one annotation per image: a class that every head has, or its multi-label and multi-task form.

    Args:
        model: a classifier or retriever.
        shape: shape (batch, channels, height, width) of the images.
    """
    return [_sample(i, shape) for i in range(shape[0])]


def _sample(index: int, shape: tuple[int, ...]) -> ClsDataSample:
    sample = ClsDataSample(metainfo=dict(img_shape=shape[2:], num_classes=2))
    return sample.set_gt_label(torch.tensor([index % 2]))
