"""Evaluating a model that is not the runner's, or without what belongs to the runner's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from mmengine.evaluator import Evaluator
from mmengine.runner import autocast
from torch import nn

from mmrazor_quant.engine.progress import with_progress


@torch.no_grad()
def evaluate(
    model: nn.Module, dataloader: Any, evaluator: Evaluator, name: str, fp16: bool = False,
    watch: Callable[[list[Any]], object] | None = None,
) -> dict[str, float]:  # fmt: skip
    """Evaluate a model without hooks.

    Args:
        model: Something with a ``test_step``.
        dataloader: Data.
        evaluator: Metrics.
        name: What to call it while it runs.
        fp16: Evaluate in automatic mixed precision.
        watch: Called with the predictions of each batch.

    Returns:
        The metrics.
    """
    model.eval()
    for batch in with_progress(dataloader, len(dataloader), name):
        with autocast(enabled=fp16):
            outputs = model.test_step(batch)
        if watch is not None:
            watch(outputs)
        evaluator.process(data_samples=outputs, data_batch=batch)
    return evaluator.evaluate(len(dataloader.dataset))
