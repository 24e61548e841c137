"""Comparison of the boxes that two forms of a detector find in an image."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from mmengine.structures import InstanceData
from torch import Tensor

MIN_IOU = 0.5
"""Boxes of one class that overlap less are different ones."""


@dataclass(frozen=True)
class BoxAgreement:
    """How far the boxes of two detectors agree.

    Args:
        expected: number of boxes of the first.
        found: number of boxes of the second.
        matched: number of pairs of boxes, one of each, of one class at one place.
        max_score_difference: largest difference of scores in a pair.
        min_iou: smallest overlap in a pair; 1 if there is none.
        max_unmatched_score: highest score of a box without a partner.
    """

    expected: int
    found: int
    matched: int
    max_score_difference: float
    min_iou: float
    max_unmatched_score: float

    def __str__(self) -> str:
        unmatched = self.expected + self.found - 2 * self.matched
        rest = f'; {unmatched} without a partner, of scores up to {self.max_unmatched_score:.4f}' if unmatched else ''
        return (
            f'{self.expected} boxes of the fake-quantized model, {self.found} of the deployed one, {self.matched} '
            f'matched{rest}; of matched ones, largest difference of scores {self.max_score_difference:.4f}, smallest '
            f'overlap {self.min_iou:.3f}'
        )


def compare_boxes(expected: InstanceData, found: InstanceData, score_thr: float = 0.0) -> BoxAgreement:
    """Matches the boxes of two detectors, best ones first, and compares them.

    Args:
        expected: ``bboxes`` of shape (n, 4) with corners, ``scores`` and ``labels`` of shape (n,), of one image.
        found: the same of the other detector.
        score_thr: a pair counts where one of its scores is at least this high, and so does a box without a partner.

    Returns:
        The agreement.
    """
    overlaps = _overlaps(expected, found)
    pairs = []
    for i in expected.scores.argsort(descending=True).tolist():
        best = overlaps[i].max(dim=0) if len(found) else None
        if best is not None and best.values >= MIN_IOU:
            pairs.append((i, best.indices.item(), best.values.item()))
            overlaps[:, best.indices] = 0.0
    pairs = [pair for pair in pairs if max(expected.scores[pair[0]], found.scores[pair[1]]) >= score_thr]
    differences = [(expected.scores[i] - found.scores[j]).abs().item() for i, j, _ in pairs]
    counts = [(side.scores >= score_thr).sum().item() for side in (expected, found)]
    others = [*_others(expected, [i for i, *_ in pairs]), *_others(found, [j for _, j, _ in pairs])]
    unmatched = [score for score in others if score >= score_thr]
    return BoxAgreement(
        *counts, len(pairs), max(differences, default=0.0), min((p[2] for p in pairs), default=1.0),
        max(unmatched, default=0.0),
    )  # fmt: skip


def _overlaps(expected: InstanceData, found: InstanceData) -> Tensor:
    """Returns the intersections over unions, shape (n, m); 0 for boxes of different classes."""
    a, b = expected.bboxes[:, None], found.bboxes[None]
    sides = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0)
    both = sides.prod(-1)
    areas = [(boxes[..., 2:] - boxes[..., :2]).clamp(min=0).prod(-1) for boxes in (a, b)]
    ious = both / (areas[0] + areas[1] - both).clamp(min=1e-9)
    return ious * (expected.labels[:, None] == found.labels[None])


def _others(instances: InstanceData, indices: list[int]) -> list[float]:
    kept = torch.ones(len(instances), dtype=torch.bool)
    kept[indices] = False
    return instances.scores[kept].tolist()
