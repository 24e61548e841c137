"""Matching and comparing boxes."""

from __future__ import annotations

import pytest
import torch
from mmengine.structures import InstanceData

from mmrazor_quant.engine.detections import compare_boxes


def boxes(*rows):
    """Make instances of rows (left, top, right, bottom, score, label)."""
    table = torch.tensor(rows, dtype=torch.float32).reshape(-1, 6)
    return InstanceData(bboxes=table[:, :4], scores=table[:, 4], labels=table[:, 5].long())


def test_boxes_of_one_class_at_one_place_match():
    expected = boxes((0, 0, 10, 10, 0.9, 0), (20, 20, 30, 30, 0.8, 1), (50, 50, 60, 60, 0.3, 0))
    found = boxes((20, 20, 30, 28, 0.75, 1), (0, 0, 10, 10, 0.89, 0), (50, 50, 60, 60, 0.3, 1))
    agreement = compare_boxes(expected, found)
    assert (agreement.expected, agreement.found, agreement.matched) == (3, 3, 2)
    assert agreement.max_score_difference == pytest.approx(0.05)
    assert agreement.min_iou == pytest.approx(0.8)
    assert agreement.max_unmatched_score == pytest.approx(0.3)
    assert '2 without a partner, of scores up to 0.3000' in str(agreement)


def test_a_box_matches_once_and_the_best_one_first():
    expected = boxes((0, 0, 10, 9, 0.5, 0), (0, 0, 10, 10, 0.9, 0))
    agreement = compare_boxes(expected, boxes((0, 0, 10, 10, 0.9, 0)))
    assert (agreement.matched, agreement.max_score_difference, agreement.max_unmatched_score) == (1, 0.0, 0.5)


def test_boxes_below_the_threshold_do_not_count():
    expected, found = boxes((0, 0, 10, 10, 0.2, 0), (0, 0, 5, 5, 0.9, 1)), boxes((0, 0, 5, 5, 0.9, 1))
    agreement = compare_boxes(expected, found, score_thr=0.3)
    assert (agreement.expected, agreement.found, agreement.matched) == (1, 1, 1)
    assert agreement.max_unmatched_score == 0.0


@pytest.mark.parametrize('swapped', [False, True])
def test_one_side_may_be_empty(swapped):
    pair = boxes((0, 0, 10, 10, 0.9, 0)), boxes()
    agreement = compare_boxes(*(pair[::-1] if swapped else pair))
    assert (agreement.matched, agreement.max_unmatched_score) == (0, pytest.approx(0.9))
    assert compare_boxes(boxes(), boxes()).min_iou == 1.0
