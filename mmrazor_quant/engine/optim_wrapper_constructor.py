"""Optimizer groups of their own for the learned parameters of fake quantizers."""

from __future__ import annotations

from typing import Any

from mmengine.optim import DefaultOptimWrapperConstructor
from torch import nn

from mmrazor_quant.compat import FakeQuantizeBase
from mmrazor_quant.fake_quants import LSQPlusFakeQuantize
from mmrazor_quant.registry import OPTIM_WRAPPER_CONSTRUCTORS

_OWN_FIELDS = ('scale_lr_mult', 'offset_lr_mult', 'scale_decay_mult')


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class QuantOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """Build an optimizer that treats learned scales, offsets and ranges apart from weights.

    They have no weight decay, which would pull scales to zero (but for fake quantizers whose method wants it: the range
    of PACT), and a learning rate of their own. Parameters with equal options share one group, so that the optimizer
    updates them together.

    Args:
        optim_wrapper_cfg: Config of the optimizer wrapper, with its ``optimizer``.
        paramwise_cfg: ``scale_lr_mult`` (1 by default) and ``scale_decay_mult`` (0 by default, 1 for PACT) multiply
            learning rate and weight decay of learned quantization parameters; ``offset_lr_mult`` (that of scales by
            default) is the multiplier of the offsets of LSQ+. Everything else is as in mmengine.

    Raises:
        ValueError: A multiplier that is not a number >= 0.

    Example:
        >>> optim_wrapper = dict(
        ...     constructor='mmrazor.QuantOptimWrapperConstructor',
        ...     optimizer=dict(type='SGD', lr=0.01, momentum=0.9, weight_decay=1e-4),
        ...     paramwise_cfg=dict(scale_lr_mult=0.1),
        ... )
    """

    def __init__(self, optim_wrapper_cfg: dict, paramwise_cfg: dict | None = None) -> None:
        paramwise_cfg = dict(paramwise_cfg or {})
        own = {name: paramwise_cfg.pop(name, None) for name in _OWN_FIELDS}
        for name, value in own.items():
            if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 0):
                raise ValueError(f'optim_wrapper.paramwise_cfg.{name}: got {value!r}, allowed: numbers >= 0')
        super().__init__(optim_wrapper_cfg, paramwise_cfg)
        # Not empty: with an empty one mmengine puts all parameters into one group, unseen.
        self.paramwise_cfg = {**self.paramwise_cfg, **own}

    def add_params(
        self, params: list[dict], module: nn.Module, prefix: str = '', is_dcn_module: int | float | None = None
    ) -> None:
        """Add the parameters of a module to the parameter groups.

        Args:
            params: Groups, added to in place.
            module: Module whose parameters, and those of its children, are added.
            prefix: Path of the module; empty for the whole model, whose groups are then merged.
            is_dcn_module: As in mmengine.
        """
        if isinstance(module, FakeQuantizeBase):
            params.extend(self._learned_groups(module))
        else:
            super().add_params(params, module, prefix, is_dcn_module)
        if not prefix:
            params[:] = _merged(params)

    def _learned_groups(self, quantizer: nn.Module) -> list[dict[str, Any]]:
        learned = [parameter for parameter in quantizer.parameters() if parameter.requires_grad]
        offset = quantizer.offset if isinstance(quantizer, LSQPlusFakeQuantize) else None
        scale_lr, offset_lr, decay_mult = (self.paramwise_cfg[name] for name in _OWN_FIELDS)
        split = (
            ([p for p in learned if p is not offset], scale_lr),
            ([p for p in learned if p is offset], scale_lr if offset_lr is None else offset_lr),
        )
        return [self._group(quantizer, members, lr_mult, decay_mult) for members, lr_mult in split if members]

    def _group(
        self, quantizer: nn.Module, members: list[nn.Parameter], lr_mult: float | None, decay_mult: float | None
    ) -> dict[str, Any]:
        group: dict[str, Any] = {'params': members}
        if lr_mult is not None and self.base_lr is not None:
            group['lr'] = self.base_lr * lr_mult
        if self.base_wd is not None:
            default = float(getattr(quantizer, 'regularized', False))
            group['weight_decay'] = self.base_wd * (default if decay_mult is None else decay_mult)
        return group


def _merged(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Put the parameters of groups with equal options into one, each once, whatever its names in the model."""
    merged: dict[tuple, dict[str, Any]] = {}
    for group in groups:
        options = {name: value for name, value in group.items() if name != 'params'}
        key = tuple(sorted((name, repr(value)) for name, value in options.items()))
        merged.setdefault(key, {'params': [], **options})['params'].extend(group['params'])
    return [{**group, 'params': list(dict.fromkeys(group['params']))} for group in merged.values()]
