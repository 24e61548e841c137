"""Calibration images mirrored: twice the data to learn from."""

from __future__ import annotations

from typing import Any

import torch.utils._pytree as pytree
from torch import Tensor


def mirrored(batch: Any) -> Any:
    """Mirror the images of a batch left to right.

    Annotations stay as they are: reconstruction learns from what the float network makes of images.

    Args:
        batch: What ``model.test_step`` takes, in dicts, lists and tuples. Images are the tensors of three dimensions
            or more, [..., H, W].

    Returns:
        A batch of the same form.
    """
    return pytree.tree_map_only(Tensor, lambda x: x.flip(-1) if x.dim() >= 3 else x, batch)
