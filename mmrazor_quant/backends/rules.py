"""What a backend's table says."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Rules:
    """Where a backend takes quantized tensors.

    Args:
        name: name in ``CustomQuantizer(backend=...)``.
        quantized: kinds of operation whose inputs are quantized.
        optional: kinds that the user may ask for in addition.
    """

    name: str
    quantized: tuple[str, ...]
    optional: tuple[str, ...] = ()
