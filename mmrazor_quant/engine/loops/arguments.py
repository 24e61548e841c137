"""Checks of the arguments that loops take from a config."""

from __future__ import annotations

import inspect
from typing import Any


def refuse_unknown(field: str, loop_class: type, unknown: dict[str, Any]) -> None:
    """Refuse arguments that a loop does not have, naming those it has.

    Args:
        field: Config field of the loop.
        loop_class: The loop.
        unknown: Arguments that were left over.

    Raises:
        ValueError: If there are any.
    """
    if unknown:
        parameters = inspect.signature(loop_class.__init__).parameters.values()
        known = [p.name for p in parameters if p.kind is not p.VAR_KEYWORD and p.name not in ('self', 'runner')]
        raise ValueError(
            f'{field} of {loop_class.__name__} has no field {", ".join(map(repr, unknown))}; '
            f'known are {", ".join(known)}'
        )
