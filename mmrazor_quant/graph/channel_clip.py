"""Clipping activations such as ReLU6, with bounds of their own for every channel."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

_UPPER = 'clip_upper'


class ChannelClip(nn.Module):
    """Clips each channel, dimension 1, to bounds of its own.

    Cross-layer equalization puts it in the place of ReLU6 and its kind, which are not homogeneous: clip(x, a, b) / s is
    clip(x / s, a / s, b / s). Its bounds are buffers, in the state dict beside the entries of the float model.

    Args:
        activation: what it stands for.
        channels: number of channels.
        like: tensor whose type and device the bounds have.
    """

    clip_lower: Tensor
    clip_upper: Tensor

    def __init__(self, activation: nn.Hardtanh, channels: int, like: Tensor) -> None:
        super().__init__()
        # Not as a child: it is no part of what runs.
        self._original = (activation,)
        self.register_buffer('clip_lower', like.new_full((channels,), activation.min_val))
        self.register_buffer(_UPPER, like.new_full((channels,), activation.max_val))

    @property
    def original(self) -> nn.Hardtanh:
        """The activation that it stands for."""
        return self._original[0]

    def forward(self, x: Tensor) -> Tensor:
        """Clips ``x`` of shape (batch, channels, ...)."""
        shape = (-1, *[1] * (x.dim() - 2))
        return torch.clamp(x, self.clip_lower.reshape(shape), self.clip_upper.reshape(shape))

    @torch.no_grad()
    def scale(self, factor: Tensor) -> None:
        """Multiplies the bounds.

        Args:
            factor: positive, float64, shape (channels,).
        """
        for bound in (self.clip_lower, self.clip_upper):
            bound.copy_(bound.cpu().double() * factor)

    def extra_repr(self) -> str:
        """Shows what it stands for."""
        return f'{len(self.clip_upper)} channels, for {self.original}'


def is_clip(module: nn.Module) -> bool:
    """Tells whether a module clips to two constants and does nothing else (ReLU6, Hardtanh)."""
    return isinstance(module, nn.Hardtanh) and type(module).forward is nn.Hardtanh.forward


def replace_by_channel_clip(root: nn.Module, path: str, channels: int, like: Tensor) -> ChannelClip:
    """Puts a clip with bounds per channel in the place of one with two constants; nothing changes as yet.

    Args:
        root: module that contains it.
        path: its path below ``root``.
        channels: number of channels.
        like: tensor whose type and device the bounds have.

    Returns:
        The new module, or the one there is if that was done before.
    """
    activation = root.get_submodule(path)
    if isinstance(activation, ChannelClip):
        return activation
    clip = ChannelClip(activation, channels, like)
    _set_child(root, path, clip.train(activation.training))
    return clip


def follow_state_dict(root: nn.Module, state_dict: Mapping[str, Tensor], prefix: str) -> None:
    """Has a model the clips with bounds per channel that a state dict has, before that is loaded.

    Args:
        root: the model.
        state_dict: what will be loaded.
        prefix: what the entries of ``root`` begin with.
    """
    for path, module in list(root.named_modules()):
        upper = state_dict.get(f'{prefix}{path}.{_UPPER}')
        if upper is not None and is_clip(module):
            like = next(root.parameters())
            replace_by_channel_clip(root, path, len(upper), like)
        elif upper is None and isinstance(module, ChannelClip):
            _set_child(root, path, module.original)


def _set_child(root: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition('.')
    root.get_submodule(parent)._modules[name] = module
