"""Where a constant is added to the output of a layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmrazor_quant.graph.insert import WeightSite
from mmrazor_quant.graph.layers import LAYER_TYPES, batch_norm_factor


@dataclass(frozen=True)
class BiasPlace:
    """A parameter or buffer that shifts the output of a layer with its folded batch norm.

    Args:
        tensor: bias of the layer, shift of the batch norm, or running mean of a batch norm without one.
        norm: the batch norm in the last case, else None.
    """

    tensor: Tensor
    norm: nn.Module | None = None

    @torch.no_grad()
    def add(self, values: Tensor) -> None:
        """Adds to the output of the layer.

        Args:
            values: float64, on the CPU, shape (output channels,).
        """
        values = values if self.norm is None else -values / batch_norm_factor(self.norm).cpu().double()
        self.tensor.add_(values.to(self.tensor.dtype).to(self.tensor.device))


def bias_places(model: nn.Module, sites: Sequence[WeightSite]) -> tuple[dict[nn.Module, BiasPlace], dict[str, str]]:
    """Finds the biases of all layers with quantized weights.

    Args:
        model: the model that the paths of the sites start at.
        sites: its quantized weights.

    Returns:
        The place for each layer that has one, and why not for the paths of the others.
    """
    owners = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    places: dict[nn.Module, BiasPlace] = {}
    reasons: dict[str, str] = {}
    for site in sites:
        layer = model.get_submodule(site.layer)
        place = _place(layer, None if site.norm is None else model.get_submodule(site.norm))
        if not isinstance(layer, LAYER_TYPES):
            reasons[site.layer] = 'its weight is read by a function'
        elif place is None:
            reasons[site.layer] = 'it has no bias, and no batch norm that is folded into it'
        elif owners[id(place.tensor)] > 1:
            reasons[site.layer] = 'it shares its bias'
        else:
            places[layer] = place
    return places, reasons


def _place(layer: nn.Module, norm: nn.Module | None) -> BiasPlace | None:
    """The shift of a batch norm comes first: what the bias of the layer adds is multiplied by a factor, maybe zero."""
    if norm is not None and norm.bias is not None:
        return BiasPlace(norm.bias)
    if norm is not None:
        return BiasPlace(norm.running_mean, norm)
    bias = layer._parameters.get('bias')
    return None if bias is None else BiasPlace(bias)
