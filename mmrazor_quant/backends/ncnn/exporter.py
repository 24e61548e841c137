"""The files for ncnn: ``.param`` and ``.bin`` in int8, and the calibration table.

pnnx makes float32 files of the network, whose weights lie on their grids and whose quantizers are marks that it keeps.
The layers behind marks are then written with the integers and scales of training, nothing is calibrated again.
"""

from __future__ import annotations

import operator
import tempfile
from collections.abc import Sequence
from pathlib import Path

from mmrazor_quant.backends.intermediate import Intermediate

from .bin_file import read_bin, write_bin
from .convert import Activation, Converted, Weight, convert
from .marks import MARK
from .param_file import read_param, write_param
from .pnnx_tool import run_pnnx
from .table_file import write_table
from .trace import trace

FILE, WEIGHTS, TABLE = 'model.param', 'model.bin', 'model.table'
FILES = (FILE, WEIGHTS)
"""What a network consists of; the table is for reading."""


def write(network: Intermediate, folder: Path) -> Path:
    """Writes the files.

    Args:
        network: intermediate form.
        folder: where to; it exists.

    Returns:
        Path of the ``.param`` file; the ``.bin`` file and the table are beside it.

    Raises:
        ValueError: a layer that is not known, or something quantized that ncnn cannot run in integers, naming it.
    """
    shape = tuple(network.images.shape[1:])
    converted = _integer_network(network)
    for layer in converted.layers:
        if layer.kind == 'Input':
            layer.params.update(_sizes(shape, network.dynamic))
    write_param(converted.layers, folder / FILE)
    write_bin(converted.arrays, folder / WEIGHTS)
    write_table(converted.scales, folder / TABLE)
    return folder / FILE


def _integer_network(network: Intermediate) -> Converted:
    images, any_size = network.images[:1], bool({2, 3} & set(network.dynamic))
    shapes = [tuple(images.shape)]
    if any_size:
        shapes.append((*shapes[0][:2], *(2 * size for size in shapes[0][2:])))
    script, paths = trace(network.module, images, any_size)
    with tempfile.TemporaryDirectory() as folder:
        kept = [f'{MARK}{number}' for number in range(len(paths))]
        param, weights = run_pnnx(script, shapes, kept, Path(folder))
        layers = read_param(param)
        arrays = read_bin(layers, weights)
    grids = {path: network.module.get_submodule(path).grid for path in paths}
    return convert(layers, arrays, _weights(network), [Activation(path, grid) for path, grid in grids.items()])


def _weights(network: Intermediate) -> list[Weight]:
    return [
        Weight(name, operator.attrgetter(name)(network.module).detach().numpy(), grid)
        for name, grid in network.weights.items()
    ]


def _sizes(shape: Sequence[int], dynamic: Sequence[int]) -> dict[int, str]:
    """Returns the parameters of an input: width, height and channels, 0 for those that may vary."""
    channels, height, width = shape
    return {0: '0' if 3 in dynamic else str(width), 1: '0' if 2 in dynamic else str(height), 2: str(channels)}
