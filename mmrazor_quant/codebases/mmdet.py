"""What is known of mmdet."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from mmdet.models import (
    BaseDetector,
    BaseMOTModel,
    DetectionTransformer,
    SemiBaseDetector,
    SingleStageDetector,
    TwoStageDetector,
)
from mmdet.structures import DetDataSample, TrackDataSample
from mmdet.structures.mask import BitmapMasks
from mmengine.structures import InstanceData, PixelData
from torch import Tensor, nn

from mmrazor_quant.compat import let_ssd_heads_predict

from .base import Codebase

let_ssd_heads_predict()

BOXES = ((0.1, 0.1, 0.5, 0.6), (0.3, 0.2, 0.9, 0.8), (0.05, 0.5, 0.4, 0.95))
"""Left, top, right and bottom of the objects of every example image, as parts of its width and height."""
MAX_DETECTIONS, MAX_CANDIDATES = 20, 200
"""Of an example, where scores are those of noise: how many detections, and candidates for them, are looked at."""
_LIMITS = {'score_thr': 0.0, 'max_per_img': MAX_DETECTIONS, 'nms_pre': MAX_CANDIDATES}
FRAMES = 2
_BRANCHES = ('sup', 'unsup_teacher', 'unsup_student')
_HEADS_FOR_MASKS = ('mask_head', 'panoptic_head')


def owns(model: nn.Module) -> bool:
    """Tells whether the model is one of mmdet."""
    return isinstance(model, (BaseDetector, BaseMOTModel))


def samples(model: nn.Module, shape: tuple[int, ...]) -> list[Any]:
    """Returns one annotation an image: three objects with boxes, masks where there is a head for them, and the like.

    Args:
        model: a detector.
        shape: shape (batch, channels, height, width) of the images.
    """
    return _samples(model, shape, [shape[2:]] * shape[0])


def padded_samples(model: nn.Module, shape: tuple[int, ...]) -> list[Any] | None:
    """Returns the annotations of a batch whose first image is smaller than the others, and padded.

    Args:
        model: a detector.
        shape: shape (batch, channels, height, width) of the images.

    Returns:
        One annotation an image; None for a detector whose layers are not told where an image ends.
    """
    if not any(isinstance(module, DetectionTransformer) for module in model.modules()):
        return None
    # Half: a little less is not seen at the stride of the features of a small image.
    smaller = tuple(n // 2 for n in shape[2:])
    return _samples(model, shape, [smaller] + [shape[2:]] * (shape[0] - 1))


def _samples(model: nn.Module, shape: tuple[int, ...], sizes: list[tuple[int, int]]) -> list[Any]:
    classes = min(_numbers_of_classes(model), default=1)
    device = next(model.parameters(), torch.empty(0)).device
    samples = [_sample(i, size, shape[2:], classes) for i, size in enumerate(sizes)]
    # Some assigners look at masks wherever there are any; a detector does not run its RPN where there are proposals.
    if any(getattr(m, name, None) is not None for m in model.modules() for name in _HEADS_FOR_MASKS):
        _add_masks(samples)
    if any(isinstance(module, TwoStageDetector) and not module.with_rpn for module in model.modules()):
        _add_proposals(samples)
    return [sample.to(device) for sample in samples]


def _numbers_of_classes(model: nn.Module) -> Iterator[int]:
    for module in model.modules():
        count = getattr(module, 'num_classes', None)
        if isinstance(count, int) and count > 0:
            yield count


def _sample(index: int, size: tuple[int, int], padded: tuple[int, int], classes: int) -> DetDataSample:
    height, width = size
    boxes = torch.tensor(BOXES) * torch.tensor([width, height, width, height])
    labels = (torch.arange(len(BOXES)) + index) % classes
    sample = DetDataSample(
        metainfo=dict(
            img_id=index, img_path=f'{index}.jpg', img_shape=size, ori_shape=size, pad_shape=padded,
            batch_input_shape=padded, scale_factor=(1.0, 1.0), flip=False, flip_direction=None,
            border=np.zeros(4, dtype=np.float32), frame_id=index, video_length=FRAMES,
        )
    )  # fmt: skip
    sample.gt_instances = InstanceData(bboxes=boxes, labels=labels, instances_ids=torch.arange(len(BOXES)))
    sample.ignored_instances = InstanceData(bboxes=boxes[:0], labels=labels[:0])
    sample.gt_sem_seg = PixelData(sem_seg=torch.zeros(1, *padded, dtype=torch.long))
    return sample


def _add_masks(samples: list[DetDataSample]) -> None:
    for sample in samples:
        sample.gt_instances.masks = _masks(sample.gt_instances.bboxes, sample.batch_input_shape)
        sample.ignored_instances.masks = BitmapMasks([], *sample.batch_input_shape)


def _add_proposals(samples: list[DetDataSample]) -> None:
    for sample in samples:
        boxes = sample.gt_instances.bboxes.clone()
        sample.proposals = InstanceData(bboxes=boxes, scores=torch.linspace(0.9, 0.5, len(BOXES)))


def _masks(boxes: Tensor, size: tuple[int, int]) -> BitmapMasks:
    masks = np.zeros((len(boxes), *size), dtype=np.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes.int().tolist()):
        mask[top:bottom, left:right] = 1
    return BitmapMasks(masks, *size)


def forward(model: nn.Module, images: Tensor, samples: list[Any], mode: str) -> Any:
    """Runs a detector in a mode; a tracker on the images as the frames of one video.

    A teacher and its student have their loss on the same images three times: with annotations, and as each sees them.

    Args:
        model: a detector or tracker.
        images: shape (batch, channels, height, width).
        samples: one annotation an image.
        mode: ``loss``, ``predict`` or ``tensor``.
    """
    if isinstance(model, SemiBaseDetector) and mode == 'loss':
        return model(dict.fromkeys(_BRANCHES, images), {name: _seen(samples) for name in _BRANCHES}, mode=mode)
    if not isinstance(model, BaseMOTModel):
        return model(images, samples, mode=mode)
    video = TrackDataSample(metainfo=dict(key_frames_inds=[0], ref_frames_inds=[1], ori_length=len(samples)))
    video.video_data_samples = samples
    return model(images[None], [video], mode=mode)


def _seen(samples: list[Any]) -> list[Any]:
    """Returns copies of annotations, of images that were not moved."""
    samples = copy.deepcopy(samples)
    for sample in samples:
        sample.set_metainfo(dict(homography_matrix=np.eye(3, dtype=np.float32)))
    return samples


@contextmanager
def settings(model: nn.Module) -> Iterator[None]:
    """Has noise detected as well as objects are, but little of it, so that the stages after the first one run.

    Args:
        model: a detector; its test settings are changed for as long as the block runs.
    """
    changed: list[tuple[Any, str, Any]] = []
    try:
        for config in _test_settings(model):
            for name, limit in _LIMITS.items():
                value = config.get(name)
                if isinstance(value, (int, float)) and value != limit:
                    changed.append((config, name, value))
                    config[name] = limit if name == 'score_thr' else min(value, limit)
        yield
    finally:
        for config, name, value in reversed(changed):
            config[name] = value


def _test_settings(model: nn.Module) -> Iterator[Any]:
    """Yields every mapping in the test settings of a model's parts, each once."""
    seen: set[int] = set()
    waiting = [getattr(module, 'test_cfg', None) for module in model.modules()]
    while waiting:
        value = waiting.pop()
        if isinstance(value, Mapping) and id(value) not in seen:
            seen.add(id(value))
            yield value
            waiting += value.values()


def head(model: nn.Module) -> nn.Module | None:
    """Returns the head of a one-stage detector.

    Args:
        model: a detector or tracker.
    """
    return model.bbox_head if isinstance(model, SingleStageDetector) else None


CODEBASE = Codebase(
    owns,
    samples,
    forward,
    modes=(('predict', False), ('tensor', False), ('loss', True)),
    settings=settings,
    head=head,
    padded_samples=padded_samples,
)
