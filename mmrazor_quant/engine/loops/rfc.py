"""The fields of ``test_cfg`` as the RFC of MMRazor's quantization wrote them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_LOSSES = {'AdaRoundLoss': 'AdaRound', 'BRECQLoss': 'BRECQ', 'QDropLoss': 'QDrop'}


def reconstruction_of_rfc(config: Any) -> dict[str, Any]:
    """Translate ``reconstruction_cfg=dict(pattern='layer', loss=dict(type='mmrazor.AdaRoundLoss', iters=20000))``.

    Args:
        config: Value of the field.

    Returns:
        What the field ``reconstruction`` takes.

    Raises:
        ValueError: Another form.
    """
    field = 'test_cfg.reconstruction_cfg'
    known = isinstance(config, Mapping) and not set(config) - {'pattern', 'loss'}
    if not known or not isinstance(config.get('loss'), Mapping):
        raise ValueError(f'{field}: got {config!r}, allowed: a dict of pattern and loss (or test_cfg.reconstruction)')
    loss = dict(config['loss'])
    name = str(loss.pop('type', None)).rpartition('.')[2]
    if name not in _LOSSES:
        allowed = ', '.join(f'mmrazor.{known}' for known in _LOSSES)
        raise ValueError(f'{field}.loss.type: got {name!r}, allowed: {allowed}')
    pattern = {'granularity': config['pattern']} if 'pattern' in config else {}
    return {'type': f'mmrazor.{_LOSSES[name]}', **pattern, **loss}
