"""Encodings: the grids of tensors as JSON, by name of the tensor in the float ONNX file beside it.

AIMET writes such files, and the converters of SNPE and QNN read them (``--quantization_overrides``). There are three
versions that say the same in other words. In 0.6.1 and 1.0.0 integers are unsigned, and a value is
``(q + offset) * scale``; in 2.0.0 it is ``(q - y_zero_point) * y_scale``, as in ONNX.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mmrazor_quant.backends.grid import QuantGrid

WIDTHS = (4, 8)
"""Bits that integers are stored in; those of fewer take the next."""


@dataclass(frozen=True)
class Encoding:
    """The grid of a tensor.

    Args:
        name: name of the tensor.
        grid: the grid.
        is_weight: whether the tensor is a weight.
    """

    name: str
    grid: QuantGrid
    is_weight: bool

    @property
    def bits(self) -> int:
        """Bits of the integers."""
        needed = (self.grid.quant_max - self.grid.quant_min).bit_length()
        return next(width for width in WIDTHS if width >= needed)

    @property
    def is_symmetric(self) -> bool:
        """Whether the integers are signed, with a zero point of 0."""
        return self.grid.quant_min < 0 and not self.grid.zero_point.any()

    @property
    def scales(self) -> list[float]:
        """Steps, one or one a channel."""
        return [float(scale) for scale in self.grid.scale]

    @property
    def offsets(self) -> list[int]:
        """What is added to unsigned integers before they are multiplied with the step."""
        shift = 2 ** (self.bits - 1) if self.grid.quant_min < 0 else 0
        return [-int(zero_point) - shift for zero_point in self.grid.zero_point]


def version_0_6_1(encodings: Sequence[Encoding]) -> dict[str, Any]:
    """Lists scale, offset and range of each channel, by name of the tensor."""
    weights = [encoding for encoding in encodings if encoding.is_weight]
    others = [encoding for encoding in encodings if not encoding.is_weight]
    return {
        'version': '0.6.1',
        'activation_encodings': {encoding.name: _channels(encoding) for encoding in others},
        'param_encodings': {encoding.name: _channels(encoding) for encoding in weights},
        'quantizer_args': {
            'activation_bitwidth': max((encoding.bits for encoding in others), default=8),
            'dtype': 'int',
            'is_symmetric': str(all(encoding.is_symmetric for encoding in weights)),
            'param_bitwidth': max((encoding.bits for encoding in weights), default=8),
            'per_channel_quantization': str(any(encoding.grid.ch_axis != -1 for encoding in weights)),
            # How AIMET found the ranges; here it is unknown, and nothing is to be found any more.
            'quant_scheme': 'min_max',
        },
    }


def _channels(encoding: Encoding) -> list[dict[str, Any]]:
    return [
        {
            'bitwidth': encoding.bits,
            'dtype': 'int',
            'is_symmetric': str(encoding.is_symmetric),
            'max': scale * (offset + 2**encoding.bits - 1),
            'min': scale * offset,
            'offset': offset,
            'scale': scale,
        }
        for scale, offset in zip(encoding.scales, encoding.offsets)
    ]


def version_1_0_0(encodings: Sequence[Encoding]) -> dict[str, Any]:
    """Lists tensors with their scales and offsets."""
    return {
        'version': '1.0.0',
        'activation_encodings': [_tensor(encoding) for encoding in encodings if not encoding.is_weight],
        'param_encodings': [_tensor(encoding) for encoding in encodings if encoding.is_weight],
    }


def _tensor(encoding: Encoding) -> dict[str, Any]:
    return {
        'name': encoding.name,
        'dtype': 'INT',
        'bw': encoding.bits,
        'is_sym': encoding.is_symmetric,
        'enc_type': 'PER_TENSOR' if encoding.grid.ch_axis == -1 else 'PER_CHANNEL',
        'scale': encoding.scales,
        'offset': encoding.offsets,
    }


def version_2_0_0(encodings: Sequence[Encoding]) -> dict[str, Any]:
    """Lists tensors with what ONNX's QuantizeLinear has."""
    return {'version': '2.0.0', 'encodings': [_quantize_linear(encoding) for encoding in encodings]}


def _quantize_linear(encoding: Encoding) -> dict[str, Any]:
    grid = encoding.grid
    kind = 'int' if encoding.is_symmetric else 'uint'
    entry: dict[str, Any] = {'name': encoding.name, 'output_dtype': f'{kind}{encoding.bits}'}
    if grid.ch_axis == -1:
        entry['y_scale'] = encoding.scales[0]
    else:
        entry.update(y_scale=encoding.scales, axis=grid.ch_axis)
    if not encoding.is_symmetric:
        # Weights are symmetric: this is an activation, which has one.
        entry['y_zero_point'] = -encoding.offsets[0]
    return entry


VERSIONS: dict[str, Callable[[Sequence[Encoding]], dict[str, Any]]] = {
    '0.6.1': version_0_6_1,
    '1.0.0': version_1_0_0,
    '2.0.0': version_2_0_0,
}
"""What writes each version."""
