"""ncnn's ``.bin`` files: the arrays of all layers one behind the other, little-endian, without names or sizes.

Some arrays, such as the weights of convolutions, have a tag of four bytes in front that names their type, and zeros
behind, up to a multiple of four bytes. The others, such as biases and scales, are plain float32.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .layer_types import Slot, check_known, slots
from .param_file import Layer

FLOAT32, INT8 = 0, 0x000D4B38
_TAGS = {np.dtype('<f4'): FLOAT32, np.dtype('int8'): INT8}


@dataclass(frozen=True)
class Array:
    """An array of a layer.

    Args:
        values: float32, or int8 if it is tagged; shape [n].
        is_tagged: whether a tag is in front.
    """

    values: np.ndarray
    is_tagged: bool = False

    def pack(self) -> bytes:
        """Returns the bytes in the file."""
        values = self.values.astype('<f4') if self.values.dtype.kind == 'f' else self.values
        content = values.tobytes()
        tag = struct.pack('<I', _TAGS[values.dtype]) if self.is_tagged else b''
        return tag + content + b'\0' * (-len(content) % 4)


def read_bin(layers: list[Layer], path: Path) -> list[list[Array]]:
    """Reads a file of float32 weights.

    Args:
        layers: the layers of the ``.param`` file; marks have no arrays.
        path: path of the file.

    Returns:
        The arrays of each layer.

    Raises:
        ValueError: a layer of unknown type, a file that does not fit the layers, or weights that are not float32.
    """
    check_known(layers)
    content = Path(path).read_bytes()
    reader = _Reader(content)
    arrays = [[reader.read(slot, layer) for slot in slots(layer)] for layer in layers]
    if reader.position != len(content):
        raise ValueError(f'{path} has {len(content)} bytes, of which the layers take {reader.position}')
    return arrays


class _Reader:
    def __init__(self, content: bytes) -> None:
        self.content, self.position = content, 0

    def read(self, slot: Slot, layer: Layer) -> Array:
        tag = self._take(4, layer) if slot.is_tagged else b'\0' * 4
        if struct.unpack('<I', tag) != (FLOAT32,):
            raise ValueError(f'{layer.name}: a weight with the tag {tag.hex()}, allowed: float32 (00000000)')
        return Array(np.frombuffer(self._take(4 * slot.count, layer), '<f4'), slot.is_tagged)

    def _take(self, size: int, layer: Layer) -> bytes:
        found = self.content[self.position : self.position + size]
        if len(found) < size:
            raise ValueError(f'{layer.name}: the .bin file ends within its arrays')
        self.position += size
        return found


def write_bin(arrays: list[list[Array]], path: Path) -> None:
    """Writes a file.

    Args:
        arrays: the arrays of each layer.
        path: where to.
    """
    Path(path).write_bytes(b''.join(array.pack() for layer in arrays for array in layer))
