"""A quantized network that is exported, by whatever tool, with integer weights and Q/DQ pairs.

mmdeploy writes the file itself, behind what it rewrites, so the network has to say at each place what is to be written:
the standard operations that :mod:`mmrazor_quant.backends.qdq` writes.
"""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from mmrazor_quant import ops
from mmrazor_quant.backends.grid import QuantGrid
from mmrazor_quant.backends.intermediate import FakeQuantNode, bake_with_grids
from mmrazor_quant.backends.qdq import KEEP_SIGNS, NOT_NEGATIVE, UINT8, as_uint8


def explicit_network(model: nn.Module) -> nn.Module:
    """Returns the network of a calibrated or trained model, ready to be exported with standard operations.

    Args:
        model: a :class:`mmrazor_quant.algorithms.GeneralQuant`; left as it is.

    Returns:
        A copy of its architecture, on the CPU, in eval mode, that computes what the fake-quantized one does.

    Raises:
        ValueError: a fake quantizer that has no grid of whole numbers, or more than 8 bits.
        RuntimeError: the model is not calibrated.
    """
    network, weights, activations = bake_with_grids(model)
    for path, grid in activations.items():
        as_uint8(grid, False)  # an error here says more than one during the export
        parent, _, name = path.rpartition('.')
        network.get_submodule(parent)._modules[name] = QuantizePair(grid)
    for path, grid in weights.items():
        owner, _, name = path.rpartition('.')
        module = network.get_submodule(owner)
        parametrize.register_parametrization(module, name, IntegerWeight(operator.attrgetter(name)(module), grid))
    return network.eval()


class _Pair(torch.autograd.Function):
    """Fake quantization that is exported as a QuantizeLinear and a DequantizeLinear, with a Clip between if needed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, grid: QuantGrid) -> Tensor:
        return ops.fake_quantize(x, scale, zero_point, grid.quant_min, grid.quant_max, grid.ch_axis)

    @staticmethod
    def symbolic(g: Any, x: Any, scale: Any, zero_point: Any, grid: QuantGrid) -> Any:
        low, high, zero = as_uint8(grid, _is_not_negative(x))
        # Per tensor they have to be scalars: of shape [1], ONNX Runtime does not fuse additions.
        qparams = _constant(g, grid.scale.reshape(())), _constant(g, np.uint8(zero))
        quantized = g.op('QuantizeLinear', x, *qparams)
        if (low, high) != UINT8:
            quantized = g.op('Clip', quantized, _constant(g, np.uint8(low)), _constant(g, np.uint8(high)))
        real = g.op('DequantizeLinear', quantized, *qparams)
        real.setType(x.type())
        return real


class QuantizePair(FakeQuantNode):
    """Stands for an activation quantizer, and is written with standard operations."""

    def forward(self, x: Tensor) -> Tensor:
        """Fake-quantize."""
        return _Pair.apply(x, self.scale, self.zero_point, self.grid)


class _Dequantized(torch.autograd.Function):
    """A weight that is exported as integers behind a DequantizeLinear."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, integers: Tensor, grid: QuantGrid) -> Tensor:
        return weight.view_as(weight)

    @staticmethod
    def symbolic(g: Any, weight: Any, integers: Any, grid: QuantGrid) -> Any:
        axis = {} if grid.ch_axis == -1 else dict(axis_i=grid.ch_axis)
        scale, zero_point = grid.scale, grid.zero_point.astype(np.int8)
        if grid.ch_axis == -1:
            scale, zero_point = scale.reshape(()), zero_point.reshape(())
        real = g.op('DequantizeLinear', integers, _constant(g, scale), _constant(g, zero_point), **axis)
        real.setType(weight.type())
        return real


class IntegerWeight(nn.Module):
    """Parametrization of a weight that lies on its grid.

    Args:
        weight: the weight.
        grid: its grid.
    """

    def __init__(self, weight: Tensor, grid: QuantGrid) -> None:
        super().__init__()
        integers = grid.integers(weight.detach().cpu().numpy()).astype(np.int8)
        self.register_buffer('integers', torch.from_numpy(integers))
        self.grid = grid

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight."""
        return _Dequantized.apply(weight, self.integers, self.grid)


def _constant(g: Any, values: Any) -> Any:
    return g.op('Constant', value_t=torch.from_numpy(np.array(values)))


def _is_not_negative(value: Any) -> bool:
    """Tells whether a tensor of the graph comes from an operation without negative results."""
    while True:
        kind = value.node().kind().removeprefix('onnx::')
        if kind in NOT_NEGATIVE:
            return True
        if kind not in KEEP_SIGNS:
            return False
        value = next(value.node().inputs())
