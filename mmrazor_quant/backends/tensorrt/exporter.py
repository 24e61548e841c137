"""The file for TensorRT: ONNX with explicit quantization, int8 pairs around float weights and activations."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import helper

from mmrazor_quant.backends.grid import QuantGrid
from mmrazor_quant.backends.intermediate import Intermediate
from mmrazor_quant.backends.qdq import Writer, grid_of, to_qdq
from mmrazor_quant.backends.simplify import simplify

from .lint import lint

FILE, ENGINE = 'model.onnx', 'model.engine'
INT8 = (-128, 127)


class TensorRTWriter(Writer):
    """Pairs of int8 with a zero point of 0.

    Weights stay float, which TensorRT 8 asks for: they lie on their grid, so that quantizing them again changes
    nothing. Those of fewer bits use a part of the integers.
    """

    def weight(self, name: str, grid: QuantGrid) -> None:
        """Puts a pair behind a float initializer, which takes another name."""
        integers = grid.integers(self.take(name))
        shape = [-1 if d == grid.ch_axis else 1 for d in range(integers.ndim)]
        values = integers.astype(np.float32) * grid.scale.reshape(shape)
        self.weight_nodes += self._pair(self.store(f'{name}.float', values), name, grid)

    def activation(self, node: onnx.NodeProto, is_not_negative: bool) -> list[onnx.NodeProto]:
        """Makes the pair that a FakeQuant node is."""
        grid = grid_of(node, self.values)
        if (grid.quant_min, grid.quant_max) != INT8 or grid.zero_point.any():
            raise ValueError(
                f'{node.output[0]}: got integers {grid.quant_min} to {grid.quant_max} with zero point '
                f'{grid.zero_point[0]}, allowed for activations in TensorRT: -128 to 127 with 0'
            )
        return self._pair(node.input[0], node.output[0], grid)

    def _pair(self, source: str, output: str, grid: QuantGrid) -> list[onnx.NodeProto]:
        scale = self.parameter(f'{output}.scale', grid.scale, grid.ch_axis)
        zero = self.parameter(f'{output}.zero_point', np.zeros(grid.scale.shape, np.int8), grid.ch_axis)
        axis = {} if grid.ch_axis == -1 else dict(axis=grid.ch_axis)
        quantized = f'{output}.quantized'
        return [
            helper.make_node('QuantizeLinear', [source, scale, zero], [quantized], f'{output}.quantize', **axis),
            helper.make_node('DequantizeLinear', [quantized, scale, zero], [output], f'{output}.dequantize', **axis),
        ]


def write(network: Intermediate, folder: Path) -> Path:
    """Writes the file.

    Args:
        network: intermediate form.
        folder: where to; it exists.

    Returns:
        Path of the file.

    Raises:
        ValueError: the file would break a rule of TensorRT.
    """
    model = to_qdq(simplify(network), TensorRTWriter)
    errors, advice = [], []
    for finding in lint(model):
        (errors if finding.is_error else advice).append(str(finding))
    if errors:
        raise ValueError("export: the file breaks TensorRT's rules:\n" + '\n'.join(errors))
    if advice:
        warnings.warn('export: TensorRT may be slower than it could be:\n' + '\n'.join(advice), stacklevel=2)
    onnx.save(model, folder / FILE)
    return folder / FILE


def next_steps(file: Path, shape: Sequence[int], dynamic: Sequence[int]) -> list[str]:
    """Returns the commands that build an engine.

    Args:
        file: path of the file.
        shape: shape of the example images.
        dynamic: dimensions that may vary.
    """
    least = [1 if d == 0 and d in dynamic else size for d, size in enumerate(shape)]
    sizes = {'minShapes': least, 'optShapes': shape, 'maxShapes': shape} if dynamic else {}
    shapes = ''.join(f' --{name}=input:{"x".join(map(str, size))}' for name, size in sizes.items())
    command = f'trtexec --onnx={file} {{}} --saveEngine={file.parent / ENGINE}{shapes}'
    return [
        f'TensorRT 10 and later: {command.format("--stronglyTyped")}',
        f'TensorRT 8 and 10: {command.format("--int8")}',
    ]
