"""What a state dict says about the fake quantizer it was saved of, and whether that is the one it is loaded into."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

FIELDS = ('quant_min', 'quant_max', 'is_symmetric', 'is_pot_scale', 'ch_axis', 'is_dynamic')
"""The entries of the buffer ``scheme``: attributes of a fake quantizer that its scales depend on."""

PLAIN = frozenset(('scale', 'zero_point', 'scheme', 'fake_quant_enabled', 'observer_enabled', 'initialized'))
"""Entries that every fake quantizer can be given; those with a meaning of their own are not among them."""

ABSENT = 'not in the checkpoint'
OTHER = 'of another fake quantizer in the checkpoint'


def scheme_record(quantizer: nn.Module) -> list[int]:
    """Give the contents of a fake quantizer's buffer ``scheme``."""
    return [int(getattr(quantizer, name)) for name in FIELDS]


def mismatch(quantizer: nn.Module, state_dict: Mapping[str, Tensor], prefix: str) -> str | None:
    """Say why the scales of a state dict are not those of a fake quantizer.

    Args:
        quantizer: Fake quantizer.
        state_dict: What is being loaded. Without an entry ``scheme``, as older ones are, schemes are not compared.
        prefix: Of the quantizer's entries.

    Returns:
        The reason; None if the quantizer can go on from them.
    """
    saved = _own_entries(state_dict, prefix)
    if 'scale' not in saved:
        return ABSENT
    if 'scheme' in saved:
        for name, own, other in zip(FIELDS, scheme_record(quantizer), saved['scheme'].tolist(), strict=True):
            if own != other:
                return f'{name} {other} in the checkpoint, {own} in the config'
    own = quantizer.state_dict().keys()
    # Of learned scales it is not the parameter that is in use, but what follows from it.
    unknown = saved.keys() - (PLAIN - {'initialized'}) - own
    absent = dict(quantizer.named_parameters(recurse=False)).keys() - saved.keys()
    # What was no learned quantizer gives a learned one its start values.
    return OTHER if unknown or (absent and 'initialized' in saved) else None


def drop(state_dict: dict[str, Tensor], prefix: str) -> None:
    """Take the entries of a fake quantizer and its observer out of a state dict."""
    for key in [key for key in state_dict if key.startswith(prefix)]:
        del state_dict[key]


def _own_entries(state_dict: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    names = {key: key[len(prefix) :] for key in state_dict if key.startswith(prefix)}
    return {name: state_dict[key] for key, name in names.items() if '.' not in name}
