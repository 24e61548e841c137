"""From the configs of a fake quantizer and its observer to the module."""

from __future__ import annotations

import inspect
from typing import Any

from mmrazor_quant.compat import FakeQuantizeBase, UniformQuantizationObserverBase
from mmrazor_quant.qscheme import QScheme
from mmrazor_quant.registry import MODELS


def build_fake_quant(
    fake_quant_cfg: dict[str, Any], observer_cfg: dict[str, Any], scheme: QScheme, field: str
) -> FakeQuantizeBase:
    """Build a fake quantizer with its observer.

    Args:
        fake_quant_cfg: ``type`` and further arguments of the fake quantizer.
        observer_cfg: ``type`` and further arguments of the observer.
        scheme: Integers and granularity.
        field: Where the configs stand in the user's config, for messages: ``qconfig.w`` or ``qconfig.a``, before
            ``_fake_quant`` and ``_observer``.

    Returns:
        The fake quantizer.

    Raises:
        ValueError: An unknown type, or an argument that the classes do not take.
    """
    fake_quant, fake_quant_args = _split(fake_quant_cfg, f'{field}_fake_quant', FakeQuantizeBase)
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
        raise ValueError(f'{field}: {fake_quant.__name__} with {observer.__name__}: {error}') from error


def _split(cfg: dict[str, Any], field: str, base: type) -> tuple[type, dict[str, Any]]:
    """Give the class that a config names, which derives from ``base``, and the other entries."""
    if not isinstance(cfg, dict) or 'type' not in cfg:
        raise ValueError(f'{field}: got {cfg!r}, allowed: a dict with a type')
    args = dict(cfg)
    kind = args.pop('type')
    found = kind if inspect.isclass(kind) else MODELS.get(kind)
    if found is None or not issubclass(found, base):
        known = sorted(f'mmrazor.{name}' for name, cls in MODELS.module_dict.items() if issubclass(cls, base))
        raise ValueError(f'{field}.type: got {kind!r}, allowed: {", ".join(known)}, and classes like them')
    return found, args
