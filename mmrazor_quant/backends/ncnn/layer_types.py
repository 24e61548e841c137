"""What the layers of ncnn have in a ``.bin`` file, which tells neither names nor sizes.

A layer that is not in these tables cannot be read over, so it is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .marks import mark_number
from .param_file import Layer


@dataclass(frozen=True)
class Slot:
    """Where a layer has an array.

    Args:
        count: how many numbers.
        is_tagged: whether a tag that names their type is in front of them; without one they are float32.
    """

    count: int
    is_tagged: bool = False


def _with_bias(weight: int, bias: int, outputs: int = 0) -> Callable[[Layer], list[Slot]]:
    """Returns the layout of a weight and maybe a bias, from the parameters that give their sizes."""

    def layout(layer: Layer) -> list[Slot]:
        biases = [Slot(layer.number(outputs))] if layer.number(bias) else []
        return [Slot(layer.number(weight), is_tagged=True), *biases]

    return layout


def _vectors(count: int, size: int, if_set: int | None = None) -> Callable[[Layer], list[Slot]]:
    """Returns the layout of several vectors of one size, which are there if a parameter (1 by default) is set."""

    def layout(layer: Layer) -> list[Slot]:
        is_there = if_set is None or layer.number(if_set, 1)
        return [Slot(layer.number(size))] * count if is_there else []

    return layout


def _scale(layer: Layer) -> list[Slot]:
    size = layer.number(0)
    # This size stands for a second input instead of weights.
    return [] if size == -233 else [Slot(size)] * (2 if layer.number(1) else 1)


def _memory(layer: Layer) -> list[Slot]:
    count = 1
    for key in (0, 1, 11, 2):
        count *= layer.number(key) or 1
    return [Slot(count, is_tagged=layer.number(21, 1) == 0)]


def _nothing(layer: Layer) -> list[Slot]:
    return []


CONVOLUTION, DEPTHWISE, LINEAR = 'Convolution', 'ConvolutionDepthWise', 'InnerProduct'

CONVOLUTIONS = (
    CONVOLUTION, DEPTHWISE, 'Convolution1D', 'ConvolutionDepthWise1D', 'Convolution3D', 'ConvolutionDepthWise3D',
    'Deconvolution', 'DeconvolutionDepthWise', 'Deconvolution1D', 'DeconvolutionDepthWise1D', 'Deconvolution3D',
    'DeconvolutionDepthWise3D', 'DeformableConv2D',
)  # fmt: skip

_WITHOUT_ARRAYS = (
    'AbsVal', 'BinaryOp', 'BNLL', 'Cast', 'CELU', 'Clip', 'Concat', 'CopyTo', 'Crop', 'CumulativeSum', 'Diag',
    'Dropout', 'Einsum', 'Eltwise', 'ELU', 'Erf', 'Exp', 'ExpandDims', 'Flatten', 'Flip', 'Fold', 'GELU', 'GLU',
    'GridSample', 'HardSigmoid', 'HardSwish', 'Input', 'Interp', 'Log', 'LRN', 'MatMul', 'Mish', 'MVN', 'Noop',
    'Packing', 'Padding', 'Permute', 'PixelShuffle', 'Pooling', 'Pooling1D', 'Pooling3D', 'Power', 'Reduction', 'ReLU',
    'Reorg', 'Reshape', 'SELU', 'Shrink', 'ShuffleChannel', 'Sigmoid', 'Slice', 'Softmax', 'Softplus', 'Split',
    'Squeeze', 'Swish', 'TanH', 'Threshold', 'Tile', 'UnaryOp', 'Unfold',
)  # fmt: skip

LAYOUTS: dict[str, Callable[[Layer], list[Slot]]] = {
    **dict.fromkeys(_WITHOUT_ARRAYS, _nothing),
    **dict.fromkeys(CONVOLUTIONS, _with_bias(weight=6, bias=5)),
    LINEAR: _with_bias(weight=2, bias=1),
    'Embed': _with_bias(weight=3, bias=2),
    'BatchNorm': _vectors(4, size=0),
    'Bias': _vectors(1, size=0),
    'PReLU': _vectors(1, size=0),
    'LayerNorm': _vectors(2, size=0, if_set=2),
    'RMSNorm': _vectors(1, size=0, if_set=2),
    'GroupNorm': _vectors(2, size=1, if_set=3),
    'InstanceNorm': _vectors(2, size=0, if_set=2),
    'Scale': _scale,
    'MemoryData': _memory,
}
"""Layouts of the layers that are known, by type."""

INTEGER = (CONVOLUTION, DEPTHWISE, LINEAR)
"""Layers that ncnn runs in integers."""

INT8_SCALE_TERM = 8
"""Parameter that says so."""


def slots(layer: Layer) -> list[Slot]:
    """Returns the arrays that a layer has in the ``.bin`` file.

    Args:
        layer: a layer of known type, or a mark.
    """
    return [] if mark_number(layer.kind) is not None else LAYOUTS[layer.kind](layer)


def check_known(layers: list[Layer]) -> None:
    """Refuses layers whose arrays are not known.

    Args:
        layers: layers of a network.

    Raises:
        ValueError: there are such layers, naming them.
    """
    unknown = [
        f'{layer.kind} ({layer.name})'
        for layer in layers
        if layer.kind not in LAYOUTS and mark_number(layer.kind) is None
    ]
    if unknown:
        raise ValueError(
            f'--backend ncnn: pnnx made layers of unknown types: {", ".join(unknown)}; ncnn lacks the operation, or it '
            f'is missing in mmrazor_quant.backends.ncnn.layer_types; allowed: {", ".join(sorted(LAYOUTS))}'
        )
