"""What a library has to say about its models, so that they can be run on an example."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


def _plain_forward(model: nn.Module, images: torch.Tensor, samples: list[Any], mode: str) -> Any:
    return model(images, samples, mode=mode)


def _no_padding(model: nn.Module, shape: tuple[int, ...]) -> None:
    return None


def _no_head(model: nn.Module) -> None:
    return None


def _no_classes(outputs: list[Any]) -> None:
    return None


@dataclass(frozen=True)
class Codebase:
    """One library.

    Args:
        owns: ``owns(model)``: whether the model is one of the library.
        samples: ``samples(model, shape)``: one annotation an image, for images of shape (batch, channels, height,
            width).
        forward: ``forward(model, images, samples, mode)``: runs the model in a mode.
        modes: the modes to run, each with the training flag; in eval first. Of those in eval the first that works says
            that the model runs on an input.
        settings: ``settings(model)``: context in which every part of the model takes part in ``predict``.
        head: ``head(model)``: the part behind ``extract_feat`` whose forward gives all raw results; None: there is no
            such thing.
        padded_samples: ``padded_samples(model, shape)``: as ``samples``, for a batch of images of which one is smaller
            and was padded; None: that makes no difference to the model's layers.
        classes: ``classes(outputs)``: the class of each image, of what ``predict`` gave; None: images have no class.
    """

    owns: Callable[[nn.Module], bool]
    samples: Callable[[nn.Module, tuple[int, ...]], list[Any] | None]
    forward: Callable[[nn.Module, torch.Tensor, Any, str], Any] = _plain_forward
    modes: tuple[tuple[str, bool], ...] = (('tensor', False), ('predict', False), ('loss', True))
    settings: Callable[[nn.Module], AbstractContextManager] = contextlib.nullcontext
    head: Callable[[nn.Module], nn.Module | None] = _no_head
    padded_samples: Callable[[nn.Module, tuple[int, ...]], list[Any] | None] = _no_padding
    classes: Callable[[list[Any]], list[Any] | None] = _no_classes


UNKNOWN = Codebase(owns=lambda model: True, samples=lambda model, shape: None)
"""A model of no known library."""
