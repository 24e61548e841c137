"""What the runtimes of all backends have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor


class Session(Protocol):
    """A deployed network.

    Attributes:
        shape: sizes that the images must have, shape [4]; None where any will do.
        stand_in: says what runs the network, and why, where the backend itself is not there; may be missing.
    """

    shape: tuple[int | None, ...]

    def __call__(self, images: np.ndarray) -> list[np.ndarray]:
        """Runs float32 images of that shape; returns the outputs, with the batch in dimension 0."""


@dataclass(frozen=True)
class Layers:
    """How the layers of a deployed network are executed.

    Args:
        integer: counts of those in integers, by the backend's name of the kind.
        float: counts of those in float.
    """

    integer: dict[str, int]
    float: dict[str, int]

    def __str__(self) -> str:
        def listed(counts: dict[str, int]) -> str:
            return ', '.join(f'{n} {kind}' for kind, n in counts.items()) or 'none'

        return f'in integers: {listed(self.integer)}; in float: {listed(self.float)}'


def run(session: Session, images: Tensor) -> list[Tensor]:
    """Runs images of any batch size; where the file takes one size only, in pieces of it, the last one filled up.

    Args:
        session: the network.
        images: float32, shape [batch, channels, height, width].

    Returns:
        The outputs.

    Raises:
        ValueError: images of a size that the file does not take.
    """
    size, *rest = session.shape
    if any(want is not None and want != have for want, have in zip(rest, images.shape[1:])):
        raise ValueError(
            f'the file takes images of {tuple(rest)} (None: any size), got {tuple(images.shape[1:])}; export it with '
            '--input-shape, or with --dynamic-size'
        )
    array = images.detach().cpu().numpy()
    count = len(array)
    if size is None:
        pieces = [session(array)]
    else:
        filled = np.concatenate([array, np.repeat(array[-1:], -count % size, axis=0)])
        pieces = [session(filled[i : i + size]) for i in range(0, len(filled), size)]
    return [torch.from_numpy(np.concatenate(parts)[:count]).to(images.device) for parts in zip(*pieces)]
