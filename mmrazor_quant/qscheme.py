"""From what a config says about a quantizer (bits, symmetry, granularity) to its integer range."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch

from .arguments import require

MAX_BIT = 32
_FLAGS = ('is_symmetry', 'is_per_channel', 'is_pot_scale', 'is_symmetric_range')


@dataclass(frozen=True)
class QScheme:
    """How a tensor is quantized, without its scale and zero point.

    =========== ========= ===========================================================
    is_symmetry is_signed integers
    =========== ========= ===========================================================
    True        True      ``[-2^(b-1), 2^(b-1)-1]``, zero point 0 (the default)
    True        False     ``[0, 2^b-1]``, zero point 0: for tensors that are never negative
    False       False     ``[0, 2^b-1]``, free zero point (the default)
    False       True      ``[-2^(b-1), 2^(b-1)-1]``, free zero point
    =========== ========= ===========================================================

    Args:
        bit: Number of bits, 1 to 32.
        is_symmetry: Whether the zero point is fixed to 0.
        is_per_channel: One scale and zero point per channel instead of one per tensor.
        is_pot_scale: Restrict scales to powers of two.
        is_symmetric_range: Leave out the lowest integer, so that the range is ``[-n, n]``. For signed ranges only.
        is_signed: Whether the integers are signed; None: signed if symmetric.
        ch_axis: Dimension of the channels, counted from the front. Without meaning unless ``is_per_channel``.

    Raises:
        ValueError: A field has a value that is not allowed; names the field, the value and what is allowed.

    Example:
        >>> scheme = QScheme(bit=4, is_per_channel=True)
        >>> scheme.quant_min, scheme.quant_max
        (-8, 7)
    """

    bit: int = 8
    is_symmetry: bool = True
    is_per_channel: bool = False
    is_pot_scale: bool = False
    is_symmetric_range: bool = False
    is_signed: bool | None = None
    ch_axis: int = 0

    def __post_init__(self) -> None:
        self._check('')

    @classmethod
    def from_cfg(cls, cfg: dict[str, Any], field: str) -> QScheme:
        """Build a scheme from a config.

        Args:
            cfg: Some of the fields above.
            field: Where ``cfg`` stands in the user's config, such as ``'qconfig.w_qscheme'``; for messages.

        Returns:
            The scheme.

        Raises:
            ValueError: Not a dict, an unknown key, or a value that is not allowed.
        """
        if not isinstance(cfg, dict):
            raise ValueError(f'{field}: got {cfg!r}, allowed is a dict of the fields of QScheme')
        known = [f.name for f in dataclasses.fields(cls)]
        for key in cfg:
            if key not in known:
                raise ValueError(f'{field}.{key}: unknown field, allowed are {", ".join(known)}')
        # Checked here, before __post_init__ does it again, so that the message carries the full path of the field.
        unchecked = object.__new__(cls)
        for f in dataclasses.fields(cls):
            object.__setattr__(unchecked, f.name, cfg.get(f.name, f.default))
        unchecked._check(f'{field}.')
        return cls(**cfg)

    def _check(self, prefix: str) -> None:
        require(_is_int(self.bit) and 1 <= self.bit <= MAX_BIT, f'{prefix}bit', self.bit, f'integers 1 to {MAX_BIT}')
        for name in _FLAGS:
            require(isinstance(getattr(self, name), bool), f'{prefix}{name}', getattr(self, name), 'True, False')
        require(
            self.is_signed is None or isinstance(self.is_signed, bool),
            f'{prefix}is_signed', self.is_signed, 'True, False, None',
        )  # fmt: skip
        require(_is_int(self.ch_axis) and self.ch_axis >= 0, f'{prefix}ch_axis', self.ch_axis, 'integers from 0 up')
        if self.is_symmetric_range:
            require(self.signed, f'{prefix}is_symmetric_range', True, 'False where the integers are not signed')
            require(self.bit > 1, f'{prefix}is_symmetric_range', True, 'False with 1 bit (one level would be left)')

    @property
    def signed(self) -> bool:
        """Whether the integers are signed."""
        return self.is_symmetry if self.is_signed is None else self.is_signed

    @property
    def quant_min(self) -> int:
        """Lowest integer."""
        if not self.signed:
            return 0
        return -(2 ** (self.bit - 1)) + int(self.is_symmetric_range)

    @property
    def quant_max(self) -> int:
        """Highest integer."""
        return 2 ** (self.bit - 1) - 1 if self.signed else 2**self.bit - 1

    @property
    def torch_qscheme(self) -> torch.qscheme:
        """The same granularity and symmetry in torch's terms."""
        if self.is_per_channel:
            return torch.per_channel_symmetric if self.is_symmetry else torch.per_channel_affine
        return torch.per_tensor_symmetric if self.is_symmetry else torch.per_tensor_affine

    @property
    def dtype(self) -> torch.dtype:
        """The torch dtype that the integers fit: 8 bit up to 8 bits, ``torch.qint32`` above."""
        if self.bit > 8:
            return torch.qint32
        return torch.qint8 if self.signed else torch.quint8

    def observer_params(self) -> dict[str, Any]:
        """Give the arguments that observers take.

        Returns:
            ``dtype``, ``qscheme``, ``quant_min``, ``quant_max``, ``ch_axis`` (-1 when per tensor), ``is_pot_scale``.
        """
        return {
            'dtype': self.dtype,
            'qscheme': self.torch_qscheme,
            'quant_min': self.quant_min,
            'quant_max': self.quant_max,
            'ch_axis': self.ch_axis if self.is_per_channel else -1,
            'is_pot_scale': self.is_pot_scale,
        }


def _is_int(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)
