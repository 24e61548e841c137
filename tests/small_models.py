"""Small models, and short ways to quantize and calibrate them, for the tests of graph passes and algorithms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import mmrazor_quant  # noqa: F401  registers everything
from mmrazor_quant.algorithms import GeneralQuant

SHAPE = (3, 8, 8)


class Net(nn.Module):
    """A module whose forward is a function of itself and its input."""

    def __init__(self, forward: Callable[..., Any], **children: Any) -> None:
        super().__init__()
        self.function = forward
        for name, value in children.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def images(batch: int = 2, shape: tuple[int, ...] = SHAPE, seed: int = 0) -> Tensor:
    """Random images."""
    return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(seed))


def trained(model: nn.Module, seed: int = 0) -> nn.Module:
    """Gives batch norms the statistics and factors of a trained model, of either sign."""
    generator = torch.Generator().manual_seed(seed)
    for norm in model.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            norm.running_mean.normal_(generator=generator)
            norm.running_var.uniform_(0.5, 2.0, generator=generator)
            if norm.affine:
                nn.init.normal_(norm.weight, generator=generator)
                nn.init.normal_(norm.bias, generator=generator)
    return model


def qconfig(w: int | str = 8, a: int | str = 8, **fields: Any) -> dict[str, Any]:
    """A qconfig of so many bits for weights (per channel, symmetric) and activations, or ``'float'``."""
    schemes = {
        'w_qscheme': dict(bit=w, is_per_channel=True, is_symmetric_range=True) if w != 'float' else w,
        'a_qscheme': dict(bit=a, is_symmetry=False) if a != 'float' else a,
    }
    return {**schemes, 'a_observer': dict(type='mmrazor.MinMaxObserver'), **fields}


FINE = qconfig(w=16, a=16)
"""So many bits that quantization changes next to nothing, while all of it runs."""


def quantized(
    model: nn.Module, config: dict[str, Any] | None = None, input_shape: tuple[int, ...] = SHAPE, **quantizer: Any
) -> GeneralQuant:
    """Wraps a model, float as yet, in eval mode."""
    quantizer = dict(type='mmrazor.CustomQuantizer', qconfig=FINE if config is None else config, **quantizer)
    return GeneralQuant(model, quantizer, input_shape=input_shape).eval()


@torch.no_grad()
def calibrate(model: GeneralQuant, *inputs: Any) -> GeneralQuant:
    """Sets all qparams and switches quantization on."""
    model.eval()
    model.reset_observers()
    model.observe_weights()
    model.set_quant_state(False, False, True, False)
    for each in inputs or (images(),):
        model(each)
    model.compute_act_qparams()
    model.mark_calibrated()
    model.set_quant_state(False, True, False, True)
    return model


def names(quantizers: Any) -> list[str]:
    """Paths of weight or activation quantizers."""
    return [name for name, _ in quantizers]


def error(found: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest value."""
    return ((found - expected).abs().max() / expected.abs().max()).item()
