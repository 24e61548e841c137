"""From the configs of a fake quantizer and its observer to the module."""

from __future__ import annotations

import inspect
from typing import Any

from mmrazor_quant.arguments import require
from mmrazor_quant.compat import FakeQuantizeBase, UniformQuantizationObserverBase
from mmrazor_quant.qscheme import QScheme
from mmrazor_quant.registry import MODELS


def build_fake_quant(
    fake_quant_cfg: dict[str, Any], observer_cfg: dict[str, Any], scheme: QScheme, field: str, kind: str | None = None
) -> FakeQuantizeBase:
    """Build a fake quantizer with its observer.

    Args:
        fake_quant_cfg: ``type`` and further arguments of the fake quantizer.
        observer_cfg: ``type`` and further arguments of the observer.
        scheme: Integers and granularity.
        field: Where the configs stand in the user's config, for messages: ``qconfig.w`` or ``qconfig.a``, before
            ``_fake_quant`` and ``_observer``.
        kind: ``'w'`` for weights, ``'a'`` for activations; None: either.

    Returns:
        The fake quantizer.

    Raises:
        ValueError: An unknown type, one that is not for this kind of tensor, or an argument that the classes do not
            take.
    """
    fake_quant, fake_quant_args = _split(fake_quant_cfg, f'{field}_fake_quant', FakeQuantizeBase)
    if kind is not None and not _is_for(fake_quant, kind):
        names = {'w': 'weights', 'a': 'activations'}
        raise ValueError(
            f'{field}_fake_quant.type: {fake_quant.__name__} is not for {names[kind]}; allowed: '
            f'{", ".join(_known(FakeQuantizeBase, kind))}'
        )
    observer, observer_args = _split(observer_cfg, f'{field}_observer', UniformQuantizationObserverBase)
    params = scheme.observer_params()
    # Left out where they say nothing: torch's own per-tensor observers do not take them.
    if not scheme.is_per_channel:
        del params['ch_axis']
    if not scheme.is_pot_scale:
        del params['is_pot_scale']
    twice = sorted((set(fake_quant_args) & set(observer_args)) | (set(params) & {*fake_quant_args, *observer_args}))
    if twice:
        raise ValueError(f'{field}: {", ".join(twice)} given twice; the range comes from the scheme alone')
    try:
        return fake_quant(observer=observer, **params, **fake_quant_args, **observer_args)
    except (TypeError, ValueError, AssertionError, NotImplementedError) as error:
        args = {'fake_quant': fake_quant_args, 'observer': observer_args}
        raise ValueError(_message(error, field, args, f'{fake_quant.__name__} with {observer.__name__}')) from error


def _split(cfg: dict[str, Any], field: str, base: type) -> tuple[type, dict[str, Any]]:
    """Give the class that a config names, which derives from ``base``, and the other entries."""
    require(isinstance(cfg, dict) and 'type' in cfg, field, cfg, 'a dict with a type')
    args = dict(cfg)
    kind = args.pop('type')
    require(isinstance(kind, (str, type)), f'{field}.type', kind, 'the name of a class, or a class')
    found = kind if inspect.isclass(kind) else MODELS.get(kind)
    if found is None or not issubclass(found, base):
        raise ValueError(f'{field}.type: got {kind!r}, allowed: {", ".join(_known(base))}, and classes like them')
    return found, args


def _message(error: Exception, field: str, args: dict[str, dict[str, Any]], classes: str) -> str:
    """Say where in the user's config the argument stands that an error is about, if its message starts with one."""
    name = str(error).partition(':')[0]
    for part, given in args.items():
        if name in given:
            return f'{field}_{part}.{error}'
    return f'{field}: {classes}: {error}'


def _known(base: type, kind: str | None = None) -> list[str]:
    """Name the registered classes that derive from ``base`` and are for one kind of tensor."""
    classes = {name: cls for name, cls in MODELS.module_dict.items() if issubclass(cls, base)}
    return sorted(f'mmrazor.{name}' for name, cls in classes.items() if kind is None or _is_for(cls, kind))


def _is_for(fake_quant: type, kind: str) -> bool:
    return kind in getattr(fake_quant, 'tensors', ('w', 'a'))
