"""ncnn's ``.param`` files: the graph of a network as text."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

MAGIC = '7767517'


@dataclass
class Layer:
    """One line of the file.

    Args:
        kind: type of the layer.
        name: name of the layer.
        inputs: blobs that it reads; each blob is read once, ``Split`` layers make copies.
        outputs: blobs that it writes.
        params: parameters by number, as they are written.
    """

    kind: str
    name: str
    inputs: list[str]
    outputs: list[str]
    params: dict[int, str] = field(default_factory=dict)

    def number(self, key: int, default: int = 0) -> int:
        """Returns a parameter that is a whole number.

        Args:
            key: number of the parameter.
            default: what ncnn takes where it is not written.
        """
        return int(self.params.get(key, default))

    def __str__(self) -> str:
        counts = f'{len(self.inputs)} {len(self.outputs)}'
        params = [f'{key}={value}' for key, value in self.params.items()]
        return ' '.join([f'{self.kind:<24} {self.name:<24} {counts}', *self.inputs, *self.outputs, *params])


def read_param(path: Path) -> list[Layer]:
    """Reads the layers of a file, in the order in which they run.

    Args:
        path: path of the file.

    Raises:
        ValueError: no such file of ncnn's.
    """
    lines = Path(path).read_text().splitlines()
    if len(lines) < 2 or lines[0].strip() != MAGIC:
        raise ValueError(f'{path} is no .param file of ncnn: it does not start with {MAGIC}')
    try:
        return [_layer(line.split()) for line in lines[2:] if line.strip()]
    except (ValueError, IndexError) as error:
        raise ValueError(f'{path} is damaged: {error}') from error


def _layer(words: list[str]) -> Layer:
    kind, name, inputs, outputs = words[0], words[1], int(words[2]), int(words[3])
    blobs, params = words[4 : 4 + inputs + outputs], words[4 + inputs + outputs :]
    pairs = (word.split('=', 1) for word in params)
    return Layer(kind, name, blobs[:inputs], blobs[inputs:], {int(key): value for key, value in pairs})


def write_param(layers: list[Layer], path: Path) -> None:
    """Writes a file.

    Args:
        layers: the layers, in the order in which they run.
        path: where to.
    """
    blobs = sum(len(layer.outputs) for layer in layers)
    lines = [MAGIC, f'{len(layers)} {blobs}', *map(str, layers)]
    Path(path).write_text('\n'.join(lines) + '\n')
