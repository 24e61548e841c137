"""The handwritten digits that ship with scikit-learn, as a dataset of mmcls."""

from __future__ import annotations

from typing import Any

import numpy as np
from mmcls.datasets import BaseDataset
from mmcls.registry import DATASETS

SIZES = {'train': 1000, 'val': 197, 'test': 600}
"""Images in each split; together all 1,797."""


@DATASETS.register_module()
class Digits(BaseDataset):
    """1,797 grey images of 8 x 8 pixels (values 0 to 16), in fixed splits with the same share of each digit.

    A sample has ``img``, uint8 of shape (8, 8, 1), and ``gt_label``, 0 to 9.

    Args:
        split: ``'train'``, ``'val'`` or ``'test'``; no image is in two of them.
        **kwargs: Arguments of mmcls's BaseDataset, such as ``pipeline``.

    Raises:
        ValueError: If there is no such split.
        ModuleNotFoundError: If scikit-learn is not installed.

    Example:
        >>> custom_imports = dict(imports=['mmrazor_quant.datasets.digits'])
        >>> dataset = dict(type='Digits', split='train', pipeline=[dict(type='PackClsInputs')])
    """

    METAINFO = {'classes': tuple('0123456789')}

    def __init__(self, split: str, **kwargs: Any) -> None:
        if split not in SIZES:
            raise ValueError(f'dataset.split: one of {", ".join(map(repr, SIZES))} wanted, got {split!r}')
        self.split = split
        super().__init__(ann_file='', **kwargs)

    def load_data_list(self) -> list[dict[str, Any]]:
        """Return the samples of the split."""
        images, labels = _split()[self.split]
        return [{'img': image, 'gt_label': int(label)} for image, label in zip(images, labels)]


def _split() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return images of shape (N, 8, 8, 1) and labels of shape (N,) by split."""
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'the Digits dataset comes with scikit-learn: pip install scikit-learn ({error})', name=error.name
        ) from error
    digits = load_digits()
    images, labels = digits.images.astype(np.uint8)[..., None], digits.target
    splits, rest = {}, (images, labels)
    for name in ('test', 'val'):
        others, images, others_labels, labels = train_test_split(
            *rest, test_size=SIZES[name], stratify=rest[1], random_state=0
        )
        splits[name], rest = (images, labels), (others, others_labels)
    return {'train': rest, **splits}
