"""Keep in checkpoints what the augmentations of whole batches remember."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch.utils._pytree as pytree
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import nn

from mmrazor_quant.engine.quant_model import bare_model
from mmrazor_quant.registry import HOOKS

KEY = 'batch_augments'
"""Name of the entry in the checkpoint."""

_PLAIN = (int, float, str, type(None))
_OF_MODULES = frozenset(vars(nn.Module()))
"""Attributes that every module has."""


@HOOKS.register_module()
class BatchAugmentsHook(Hook):
    """Let a resumed training go on with the augmentations of batches as the uninterrupted one does.

    Some of them, in ``data_preprocessor.batch_augments``, carry a state from one batch to the next in plain
    attributes, which no state dict has: mmdet's ``BatchSyncRandomResize`` the size of the batches to come. Attributes
    that training did not change are settings, which stay those of the config.
    """

    def __init__(self) -> None:
        self._settings: list[dict[str, Any]] | None = None

    def before_train(self, runner: Runner) -> None:
        """Note what the config says.

        Args:
            runner: Runner of the model.
        """
        if self._settings is None:
            self._settings = [_plain_attributes(augment) for augment in _augments(runner)]

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Write down the attributes.

        Args:
            runner: Runner of the model.
            checkpoint: What will be written to the file.
        """
        before = self._settings or [{}] * len(list(_augments(runner)))
        checkpoint[KEY] = [
            {name: value for name, value in _plain_attributes(augment).items() if settings.get(name, ...) != value}
            for augment, settings in zip(_augments(runner), before)
        ]

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Restore the attributes of the process that is being resumed.

        Args:
            runner: Runner of the model.
            checkpoint: What was read from the file.
        """
        if runner._resume:
            self.before_train(runner)
            for augment, attributes in zip(_augments(runner), checkpoint.get(KEY, ())):
                vars(augment).update(attributes)


def _augments(runner: Runner) -> Iterator[Any]:
    preprocessor = getattr(bare_model(runner), 'data_preprocessor', None)
    found = getattr(preprocessor, 'batch_augments', None)
    # mmcls has one object, mmdet a list of them.
    if found is not None:
        yield from found if isinstance(found, (list, tuple, nn.ModuleList)) else (found,)


def _plain_attributes(augment: Any) -> dict[str, Any]:
    return {
        name: value
        for name, value in vars(augment).items()
        if name not in _OF_MODULES and all(isinstance(leaf, _PLAIN) for leaf in pytree.tree_leaves(value))
    }
