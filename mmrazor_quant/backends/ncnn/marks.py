"""Layers that stand for quantizers in what pnnx makes: their types are ``MARK`` and the number of the quantizer."""

from __future__ import annotations

from torch import Tensor, nn

MARK = 'mmrazor_quant.Mark'


class _Mark(nn.Module):
    """Does nothing. Modules of a type that pnnx is told to keep become one layer, of which the type is what is left."""

    def forward(self, x: Tensor) -> Tensor:
        return x.clone()


def make_mark(number: int) -> nn.Module:
    """Returns a module, of a type of its own, that pnnx makes a mark of.

    Args:
        number: number of the quantizer.
    """
    module, _, name = MARK.partition('.')
    return type(f'{name}{number}', (_Mark,), {'__module__': module})()


def mark_number(kind: str) -> int | None:
    """Returns the number of the quantizer that layers of a type stand for; None: for none.

    Args:
        kind: type of a layer.
    """
    number = kind.removeprefix(MARK)
    return int(number) if number != kind and number.isdigit() else None
