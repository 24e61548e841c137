"""From float32 layers with marks for quantizers to layers that run in integers."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import numpy as np

from mmrazor_quant.backends.grid import QuantGrid

from .bin_file import Array
from .layer_types import DEPTHWISE, INT8_SCALE_TERM, INTEGER
from .marks import mark_number
from .param_file import Layer

_TRANSPARENT = ('Split', 'Reshape', 'Flatten', 'Squeeze', 'ExpandDims', 'Permute', 'Padding', 'Noop', 'Dropout')
"""Layers that move values or copy them: what is quantized stays so."""

_FLOAT = "allowed in qconfig.overrides for this layer: w_qscheme='float' with a_qscheme='float'"


@dataclass(frozen=True)
class Weight:
    """A quantized weight.

    Args:
        path: path of the parameter.
        values: float32 values on the grid.
        grid: the grid.
    """

    path: str
    values: np.ndarray
    grid: QuantGrid


@dataclass(frozen=True)
class Activation:
    """A quantizer of activations.

    Args:
        path: path of the quantizer.
        grid: what it quantizes to.
    """

    path: str
    grid: QuantGrid


@dataclass(frozen=True)
class Scales:
    """Factors from real values to integers of a layer that runs in integers.

    Args:
        layer: name of the layer.
        weight: of the weight, per output channel or group, shape [n].
        input: of the input, shape [1].
    """

    layer: str
    weight: np.ndarray
    input: np.ndarray


@dataclass
class Converted:
    """A network that runs in integers.

    Args:
        layers: all layers.
        arrays: the arrays of each layer.
        scales: factors of the layers in integers.
    """

    layers: list[Layer] = field(default_factory=list)
    arrays: list[list[Array]] = field(default_factory=list)
    scales: list[Scales] = field(default_factory=list)


def convert(
    layers: list[Layer], arrays: list[list[Array]], weights: list[Weight], activations: list[Activation]
) -> Converted:
    """Puts a network into integers: the layers whose inputs are marked, with the weights and scales that are given.

    Args:
        layers: layers with marks, see :mod:`.marks`.
        arrays: float32 arrays of each layer.
        weights: the quantized weights; layers are found by their very values.
        activations: the quantizers, by the numbers of their marks.

    Returns:
        The network without marks.

    Raises:
        ValueError: something is quantized that ncnn cannot run in integers, naming it.
    """
    return _Conversion(weights, activations).run(layers, arrays)


class _Conversion:
    def __init__(self, weights: list[Weight], activations: list[Activation]) -> None:
        self.weights = {weight.values.astype('<f4').tobytes(): weight for weight in weights}
        self.activations = activations
        # Blobs that hold quantized values, and blobs that marks have written, which are those that they read.
        self.quantized: dict[str, Activation] = {}
        self.renamed: dict[str, str] = {}
        self.result = Converted()

    def run(self, layers: list[Layer], arrays: list[list[Array]]) -> Converted:
        for layer, found in zip(layers, arrays, strict=True):
            number = mark_number(layer.kind)
            inputs = [self.renamed.get(blob, blob) for blob in layer.inputs]
            if number is not None:
                self.quantized[layer.outputs[0]] = self.activations[number]
                self.renamed[layer.outputs[0]] = inputs[0]
            else:
                self._layer(dataclasses.replace(layer, inputs=inputs), found, self._quantizer(layer))
        return self.result

    def _quantizer(self, layer: Layer) -> Activation | None:
        return next((self.quantized[blob] for blob in layer.inputs if blob in self.quantized), None)

    def _layer(self, layer: Layer, arrays: list[Array], quantizer: Activation | None) -> None:
        if quantizer is not None and layer.kind in _TRANSPARENT:
            self.quantized.update(dict.fromkeys(layer.outputs, quantizer))
        elif quantizer is not None:
            layer, arrays = self._integer(layer, arrays, quantizer)
        self.result.layers.append(layer)
        self.result.arrays.append(arrays)

    def _integer(self, layer: Layer, arrays: list[Array], quantizer: Activation) -> tuple[Layer, list[Array]]:
        if layer.kind not in INTEGER:
            raise ValueError(
                f'{quantizer.path}: quantizes the input of a {layer.kind} ({layer.name}), which ncnn runs in float; '
                f'it runs {", ".join(INTEGER)} in integers; {_FLOAT}'
            )
        weight = self.weights.get(arrays[0].values.tobytes())
        if weight is None:
            raise ValueError(
                f'{quantizer.path}: quantizes the input of {layer.name}, whose weight is not quantized; {_FLOAT}'
            )
        scales = Scales(layer.name, 1 / _weight_scale(layer, weight), 1 / quantizer.grid.scale)
        self.result.scales.append(scales)
        integers = weight.grid.integers(weight.values).astype(np.int8).reshape(-1)
        arrays = [Array(integers, is_tagged=True), *arrays[1:], Array(scales.weight), Array(scales.input)]
        # The number tells the kinds of scales that the file has: depthwise layers know other ones.
        params = {**layer.params, INT8_SCALE_TERM: '1' if layer.kind == DEPTHWISE else '2'}
        return dataclasses.replace(layer, params=params), arrays


def _weight_scale(layer: Layer, weight: Weight) -> np.ndarray:
    """Returns the scales of a weight as ncnn takes them: per output channel, of grouped convolutions per group."""
    channels = len(weight.values)
    scale = np.broadcast_to(weight.grid.scale, (channels,))
    if layer.kind != DEPTHWISE:
        return scale
    groups = scale.reshape(layer.number(7, 1), -1)
    if (groups != groups[:, :1]).any():
        raise ValueError(
            f'{weight.path}: a convolution of {len(groups)} groups with {channels} output channels and scales for all, '
            f'where ncnn takes one a group; {_FLOAT}, or w_qscheme=dict(is_per_channel=False)'
        )
    return groups[:, 0]
