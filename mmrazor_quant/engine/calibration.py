"""Calibration: which data, and how their ranges get into a model."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Sized
from datetime import timedelta
from itertools import islice
from typing import Any

import torch
from mmengine.dist import broadcast
from mmengine.logging import MMLogger
from mmengine.runner import Runner
from torch.utils.data import DataLoader

from mmrazor_quant.engine.quant_model import QuantModel
from mmrazor_quant.graph.frozen import frozen_weights

LOG_INTERVAL = 10
"""Batches between two lines of progress."""


def calibrate(
    model: QuantModel,
    batches: Iterable,
    steps: int,
    field: str,
    weights_quantized: bool = False,
    after_weights: Callable[[], None] | None = None,
) -> None:
    """Set the qparams of all weights from the weights, and those of all activations from data.

    The activations observed are float ones, so that the range of one does not depend on the quantization error of
    those before it; by option the weights are quantized meanwhile. Under data parallelism each process has its own
    data, and the ranges are those of all of them together.

    Args:
        model: Model; left in the quantized state, in eval mode, and marked as calibrated.
        batches: Batches as ``model.test_step`` takes them.
        steps: Number of batches to use, at most.
        field: Config field of the data, for the errors.
        weights_quantized: Observe activations behind quantized weights instead of float ones.
        after_weights: Called when the qparams of the weights are set, before activations are observed.

    Raises:
        ValueError: If there are no data, or a quantizer saw none or saw NaN or Inf.
    """
    model.eval()
    model.reset_observers()
    model.observe_weights()
    if after_weights is not None:
        after_weights()
    model.set_quant_state(
        weight_observer=False, weight_fake_quant=weights_quantized, act_observer=True, act_fake_quant=False
    )
    with frozen_weights(model):
        done = _run_batches(model, batches, steps)
    if done == 0:
        raise ValueError(f'{field} gives no data: the calibration set is empty')
    model.compute_act_qparams()
    for tensor in model.state_dict().values():
        # Observers of this package agree already; those of torch have seen the data of their process only.
        broadcast(tensor, src=0)
    model.mark_calibrated()
    set_quantized(model)


def set_quantized(model: QuantModel) -> None:
    """Put a model into the state for evaluation: quantized, nothing observed."""
    model.set_quant_state(weight_observer=False, weight_fake_quant=True, act_observer=False, act_fake_quant=True)


def set_float(model: QuantModel) -> None:
    """Put a model into the float state: nothing quantized, nothing observed."""
    model.set_quant_state(weight_observer=False, weight_fake_quant=False, act_observer=False, act_fake_quant=False)


@torch.no_grad()
def _run_batches(model: QuantModel, batches: Iterable, steps: int) -> int:
    """Run batches through the model, logging progress; returns how many there were."""
    total = min(steps, len(batches)) if isinstance(batches, Sized) else steps
    if total == 0:
        # Not left to the iteration: mmengine's sampler divides by the number of samples.
        return 0
    logger = MMLogger.get_current_instance()
    if total < steps:
        logger.info(f'Calibration: the data give {total} batches, fewer than the {steps} asked for')
    start, done = time.perf_counter(), 0
    for done, batch in enumerate(islice(batches, steps), 1):
        model.test_step(batch)
        if done % LOG_INTERVAL == 0 or done == total:
            per_batch = (time.perf_counter() - start) / done
            remaining = timedelta(seconds=round(per_batch * (total - done)))
            logger.info(f'Calibration [{done}/{total}]  eta: {remaining}  time: {per_batch:.4f}')
    return done


def build_calibration_dataloader(
    runner: Runner, test_dataloader: dict | DataLoader, field: str, seed: int
) -> DataLoader:
    """Build the default calibration data: the training split through the transforms of the test split.

    The order is shuffled by ``seed``: a set sorted by class would otherwise calibrate on its first classes only.

    Args:
        runner: Runner whose config has a ``train_dataloader``.
        test_dataloader: Config (or dataloader) that the model is evaluated on.
        field: Config field to give other data in, for the errors.
        seed: Seed of the order.

    Returns:
        Dataloader without random augmentation.

    Raises:
        ValueError: If the config has no training data, or not in a form whose transforms can be replaced.
        RuntimeError: If the training data cannot be read.
    """
    train = _config_of(runner, 'train_dataloader', field)
    test_dataset = test_dataloader['dataset'] if isinstance(test_dataloader, dict) else test_dataloader.dataset
    if _same_data(train['dataset'], test_dataset):
        runner.logger.warning(
            'The calibration data (train_dataloader) are the data that the model is evaluated on: '
            'the accuracy measured will be too good'
        )
    pipelines = []
    _map_datasets(test_dataset, lambda each: pipelines.append(_pipeline_of(each)))
    dataset = _map_datasets(train['dataset'], lambda each: _with_transforms(each, pipelines[0], field))
    keep = ('batch_size', 'num_workers', 'collate_fn', 'pin_memory', 'prefetch_factor')
    config = {key: copy.deepcopy(train[key]) for key in keep if key in train}
    config.setdefault('batch_size', (train.get('batch_sampler') or {}).get('batch_size', 1))
    config.update(dataset=dataset, sampler={'type': 'mmengine.DefaultSampler', 'shuffle': True})
    return build_dataloader(runner, config, 'train_dataloader', field, seed)


def build_dataloader(runner: Runner, config: dict, source: str, field: str, seed: int) -> DataLoader:
    """Build a dataloader, saying on failure what it was for.

    Args:
        runner: Runner.
        config: Config of the dataloader.
        source: Config field that it comes from.
        field: Config field to give other calibration data in.
        seed: Seed of sampler and workers.

    Returns:
        The dataloader.

    Raises:
        RuntimeError: If it cannot be built, for instance because files are missing.
    """
    try:
        return runner.build_dataloader(config, seed=seed)
    except Exception as error:
        hint = '' if source == field else f'; calibration uses the training split unless {field} gives other data'
        raise RuntimeError(
            f'{source}: the calibration data cannot be built ({type(error).__name__}: {error}){hint}'
        ) from error


def _config_of(runner: Runner, name: str, field: str) -> dict:
    """Get a dataloader config of the runner, or say what is missing."""
    config = runner.cfg.get(name)
    if config is None:
        raise ValueError(
            f'{field} is not given and the config has no {name} to take calibration data from: set one '
            'of them (data of the training split, never those the model is evaluated on)'
        )
    if not isinstance(config, dict):
        raise ValueError(
            f'{name} is a built {type(config).__name__}, whose random augmentations cannot be replaced '
            f'by the transforms of the test split: set {field}'
        )
    return config


def _pipeline_of(dataset: Any) -> list | None:
    """Get the transforms of a dataset config, None where it has none or is built."""
    return dataset.get('pipeline') if isinstance(dataset, dict) else None


def _map_datasets(dataset: Any, change: Callable[[Any], Any]) -> Any:
    """Change the datasets inside of wrappers; wrappers around one dataset, which repeat or mix its images, go.

    Args:
        dataset: Dataset config, maybe of a wrapper such as RepeatDataset or ConcatDataset, or a built dataset.
        change: Called with each innermost dataset.

    Returns:
        The changed config.
    """
    if isinstance(dataset, dict) and isinstance(dataset.get('datasets'), (list, tuple)):
        return dict(dataset, datasets=[_map_datasets(each, change) for each in dataset['datasets']])
    if isinstance(dataset, dict) and 'dataset' in dataset:
        return _map_datasets(dataset['dataset'], change)
    return change(dataset)


def _with_transforms(dataset: Any, pipeline: list | None, field: str) -> Any:
    """Replace the transforms of one dataset, if it has any, by those of the test split."""
    if not isinstance(dataset, dict) and hasattr(dataset, 'pipeline'):
        raise ValueError(
            f'train_dataloader.dataset is a built {type(dataset).__name__}, whose random augmentations '
            f'cannot be replaced by the transforms of the test split: set {field}'
        )
    if not isinstance(dataset, dict) or 'pipeline' not in dataset:
        return dataset
    if pipeline is None:
        raise ValueError(
            'test_dataloader.dataset has no pipeline to replace the random augmentations of '
            f'train_dataloader.dataset.pipeline with: set {field}'
        )
    return dict(dataset, pipeline=pipeline)


def _same_data(one: Any, other: Any) -> bool:
    """Tell whether two dataset configs name the same data, whatever their transforms."""

    def without_transforms(dataset: Any) -> Any:
        is_config = isinstance(dataset, dict)
        return {k: v for k, v in dataset.items() if k not in ('pipeline', 'test_mode')} if is_config else dataset

    return _map_datasets(one, without_transforms) == _map_datasets(other, without_transforms)
