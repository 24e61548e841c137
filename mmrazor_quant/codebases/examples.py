"""Example inputs for a model, whatever library it comes from."""

from __future__ import annotations

import importlib
import itertools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from mmengine.model import BaseModel
from torch import nn

from mmrazor_quant.tracing.state import preserved, seeded

from .base import UNKNOWN, Codebase

CODEBASES = ('mmcls', 'mmdet')
"""Libraries that have a module here, named like themselves."""
DEFAULT_SIZES = (224, 256, 299, 384, 512, 32)
"""Image sizes tried, in order, when neither the user nor the model names one."""
BATCHES = (2, 1)
"""Batch sizes tried, in order: some operations take one image only."""


@dataclass(frozen=True)
class Example:
    """One example input.

    Args:
        shape: shape (batch, channels, height, width).
        run: runs the model on it in every mode that works, in train and in eval; returns whether it could predict.
    """

    shape: tuple[int, ...]
    run: Callable[[], bool]


def has_modes(model: nn.Module) -> bool:
    """Tells whether a model's forward takes OpenMMLab's ``mode``: ``loss``, ``predict`` or ``tensor``."""
    return isinstance(model, BaseModel) or hasattr(model, 'predict')


def build_examples(model: nn.Module, input_shape: Sequence[int] | None = None) -> list[Example]:
    """Makes the example that is captured and the one that verifies it at another batch and image size.

    Args:
        model: the architecture.
        input_shape: shape (channels, height, width) of one image; None: what the model says, else common sizes.

    Returns:
        One example, or two where the model accepts a second one.

    Raises:
        ValueError: the model does not run on ``input_shape`` (or on any size tried).
    """
    errors: list[str] = []
    for shape in _candidates(model, input_shape):
        error = _failure(model, shape)
        if error is None:
            return _with_second(model, shape)
        errors.append(f'{shape}: {error}')
    hint = "set GeneralQuant's input_shape=(channels, height, width)"
    raise ValueError(
        f'input_shape: the architecture does not run on an example input; {hint}. Tried ' + '; '.join(errors)
    )


def _with_second(model: nn.Module, shape: tuple[int, ...]) -> list[Example]:
    first = Example(shape, lambda: run_all_modes(model, shape))
    batch, channels, *size = shape
    larger = tuple(s + 32 * (i + 1) for i, s in enumerate(size))
    smaller = tuple(s - 32 * (i + 1) for i, s in enumerate(size))
    sizes = ([smaller] if size and min(smaller) > 96 else []) + [larger, tuple(size)]
    others = [(n, channels, *size) for n in (batch + 1, batch) for size in sizes]
    for other in (other for other in others if other != shape):
        if _failure(model, other) is None:
            return [first, Example(other, lambda other=other: run_all_modes(model, other))]
    return [first]


def _candidates(model: nn.Module, input_shape: Sequence[int] | None) -> list[tuple[int, ...]]:
    if input_shape is not None:
        if not all(isinstance(n, int) and n > 0 for n in input_shape) or not input_shape:
            raise ValueError(f'input_shape: positive integers (channels, height, width) wanted, got {input_shape!r}')
        return [(batch, *input_shape) for batch in BATCHES]
    own = _own_size(model)
    sizes = [own] if own else [(s, s) for s in DEFAULT_SIZES]
    return [(batch, channels, *size) for batch in BATCHES for channels in (3, 1) for size in sizes]


def _own_size(model: nn.Module) -> tuple[int, int] | None:
    """Returns the image size that a module of the model declares (as vision transformers do), if any."""
    for module in model.modules():
        size = getattr(module, 'img_size', None)
        if isinstance(size, int):
            return (size, size)
        if isinstance(size, (tuple, list)) and len(size) == 2 and all(isinstance(s, int) for s in size):
            return (size[0], size[1])
    return None


def _failure(model: nn.Module, shape: tuple[int, ...]) -> str | None:
    """Runs the model once in eval; returns why none of its modes works, or None."""
    codebase, errors = codebase_of(model), []
    with preserved(model), torch.no_grad(), codebase.settings(model):
        model.eval()
        for mode in (mode for mode, training in codebase.modes if not training):
            error = _try(model, shape, mode)
            if error is None:
                return None
            errors.append(error)
    return errors[0]


def run_all_modes(model: nn.Module, shape: tuple[int, ...]) -> bool:
    """Runs every mode, those of inference in eval and ``loss`` in train; the caller restores buffers and flags.

    Modes that the example's labels do not fit are passed over: they call the same modules. A model whose layers are
    told where images are padded runs on a batch with padding, too: they are called in another way then.

    Returns:
        Whether the modes of inference that make predictions worked.
    """
    codebase, failed = codebase_of(model), {}
    modes = codebase.modes if has_modes(model) else (('tensor', False), ('tensor', True))
    batches = (False,) if codebase.padded_samples(model, shape) is None else (False, True)
    with seeded(), codebase.settings(model):
        for padded, (mode, training) in itertools.product(batches, modes):
            model.train(training)
            failed[padded, mode, training] = _try(model, shape, mode, padded) is not None
    return not any(failed.get((padded, 'predict', False), failed.get((padded, 'tensor', False))) for padded in batches)


def _try(model: nn.Module, shape: tuple[int, ...], mode: str, padded: bool = False) -> str | None:
    try:
        run_mode(model, shape, mode, padded)
    except Exception as error:  # whatever the architecture raises is the answer to the question asked
        return f'{type(error).__name__}: {error}'
    return None


def run_mode(model: nn.Module, shape: tuple[int, ...], mode: str, padded: bool = False) -> Any:
    """Runs a model on random images, with annotations of the library that it comes from.

    Args:
        model: the model, in the training mode to run.
        shape: shape (batch, channels, height, width) of the images.
        mode: ``loss``, ``predict`` or ``tensor``; not for a model without modes.
        padded: have the first image padded, of a model to which that makes a difference.
    """
    parameter = next(model.parameters(), torch.empty(0))
    images = torch.randn(shape, dtype=parameter.dtype, device=parameter.device)
    if not has_modes(model):
        return model(images)
    codebase = codebase_of(model)
    samples = codebase.padded_samples if padded else codebase.samples
    return codebase.forward(model, images, samples(model, shape), mode)


def codebase_of(model: nn.Module) -> Codebase:
    """Returns what is known of the library that a model comes from; only libraries that were imported are asked."""
    for name in (name for name in CODEBASES if name in sys.modules):
        codebase = importlib.import_module(f'.{name}', __package__).CODEBASE
        if codebase.owns(model):
            return codebase
    return UNKNOWN
