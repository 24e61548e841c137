"""What is known of mmcls."""

from __future__ import annotations

from typing import Any

import torch
from mmcls.models import BaseClassifier, BaseRetriever
from mmcls.structures import ClsDataSample
from torch import nn

from .base import Codebase


def owns(model: nn.Module) -> bool:
    """Tells whether the model is one of mmcls."""
    return isinstance(model, (BaseClassifier, BaseRetriever))


def samples(model: nn.Module, shape: tuple[int, ...]) -> list[Any]:
    """Returns one annotation per image, of one of the first two classes.

    Args:
        model: a classifier or retriever.
        shape: shape (batch, channels, height, width) of the images.
    """
    classes = getattr(getattr(model, 'head', None), 'num_classes', None)
    return [_sample(i, shape, classes) for i in range(shape[0])]


def _sample(index: int, shape: tuple[int, ...], classes: int | None) -> ClsDataSample:
    metainfo = dict(img_shape=shape[2:])
    if isinstance(classes, int):
        metainfo['num_classes'] = classes
    sample = ClsDataSample(metainfo=metainfo)
    return sample.set_gt_label(torch.tensor([index % 2]))


def head(model: nn.Module) -> nn.Module | None:
    """Returns the head of a classifier.

    Args:
        model: a classifier or retriever.
    """
    return model.head if isinstance(model, BaseClassifier) and model.with_head else None


def classes(outputs: list[Any]) -> list[Any] | None:
    """Returns the classes that a classifier found; None for retrievers.

    Args:
        outputs: predictions.
    """
    labels = [sample.get('pred_label') for sample in outputs]
    return None if any(label is None for label in labels) else [label.label.tolist() for label in labels]


CODEBASE = Codebase(owns, samples, head=head, classes=classes)
