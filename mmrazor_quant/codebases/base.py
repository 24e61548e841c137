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
        head: attribute that holds the head of a model, whose forward gives raw results; None: there is no such thing.
    """

    owns: Callable[[nn.Module], bool]
    samples: Callable[[nn.Module, tuple[int, ...]], list[Any] | None]
    forward: Callable[[nn.Module, torch.Tensor, Any, str], Any] = _plain_forward
    modes: tuple[tuple[str, bool], ...] = (('tensor', False), ('predict', False), ('loss', True))
    settings: Callable[[nn.Module], AbstractContextManager] = contextlib.nullcontext
    head: str | None = None


UNKNOWN = Codebase(owns=lambda model: True, samples=lambda model, shape: None)
"""A model of no known library."""
