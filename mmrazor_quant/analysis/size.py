"""How many bytes a model takes when its weights are stored as the integers that they are quantized to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmrazor_quant.algorithms import GeneralQuant
from mmrazor_quant.compat import FakeQuantizeBase
from mmrazor_quant.graph.layers import channel_axis

SCALE_BYTES = 4
"""A scale is stored as float32."""
ZERO_POINT_BYTES = 4
"""A zero point is stored as int32."""
BIAS_BYTES = 4
"""A bias that a folded batch norm leaves is stored as float32."""

_SYMMETRIC = (torch.per_tensor_symmetric, torch.per_channel_symmetric)


@dataclass(frozen=True)
class ModelSize:
    """Bytes of a stored model.

    Args:
        integers: quantized weights, packed: ceil(elements * bits / 8) for each tensor.
        qparams: 4 for each scale and, of asymmetric schemes, 4 for each zero point, of weights and activations.
        floats: everything else as it is: float parameters and buffers, and 4 for each channel of a bias that a
            folded batch norm leaves.
    """

    integers: int
    qparams: int
    floats: int

    @property
    def total(self) -> int:
        """All bytes."""
        return self.integers + self.qparams + self.floats


def model_size(model: nn.Module) -> ModelSize:
    """Computes the size of a model as stored for inference.

    Batch norms that are folded into a quantized weight are not stored; their layer has a bias instead. A tensor
    shared by several modules is stored once.

    Args:
        model: a quantized model, or any float one, which has neither integers nor qparams.
    """
    if not isinstance(model, GeneralQuant):
        return ModelSize(0, 0, _float_bytes(model, skipped=set()))
    architecture = model.architecture
    weights: dict[int, int] = {}
    biases = 0
    skipped = {name for name, module in architecture.named_modules() if isinstance(module, FakeQuantizeBase)}
    for site in model.inserted.weights:
        weight = _tensor(architecture, site.weight)
        weights[id(weight)] = packed_bytes(weight.numel(), bits(architecture.get_submodule(site.quantizer)))
        skipped.add(site.weight)
        if site.norm is not None:
            skipped.add(site.norm)
            layer = architecture.get_submodule(site.layer)
            biases += BIAS_BYTES * layer.weight.shape[channel_axis(layer)] if layer.bias is None else 0
    quantizers = [m for m in architecture.modules() if isinstance(m, FakeQuantizeBase)]
    return ModelSize(
        integers=sum(weights.values()),
        qparams=sum(map(qparam_bytes, quantizers)),
        floats=biases + _float_bytes(architecture, skipped),
    )


def bits(quantizer: FakeQuantizeBase) -> int:
    """Returns the bits that the integers of a fake quantizer need."""
    return (quantizer.quant_max - quantizer.quant_min).bit_length()


def packed_bytes(elements: int, bit: int) -> int:
    """Returns the bytes of one tensor of integers without gaps between them."""
    return -(-elements * bit // 8)


def qparam_bytes(quantizer: FakeQuantizeBase) -> int:
    """Returns the bytes of the scales and, where they are not zero by construction, the zero points."""
    per_scale = SCALE_BYTES if quantizer.qscheme in _SYMMETRIC else SCALE_BYTES + ZERO_POINT_BYTES
    return per_scale * quantizer.scale.numel()


def _tensor(model: nn.Module, path: str) -> Tensor:
    owner, _, name = path.rpartition('.')
    return getattr(model.get_submodule(owner), name)


def _float_bytes(model: nn.Module, skipped: set[str]) -> int:
    """Sums the state dict without the entries at or below the paths in ``skipped``."""
    stored: dict[int, int] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if isinstance(value, Tensor) and not _is_below(name, skipped):
            stored[id(value)] = value.numel() * value.element_size()
    return sum(stored.values())


def _is_below(name: str, paths: set[str]) -> bool:
    parts = name.split('.')
    return any('.'.join(parts[: i + 1]) in paths for i in range(len(parts)))
