"""Checks of arguments that come from a config; what they raise names the argument, what was given, what is allowed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from numbers import Integral, Real
from typing import Any


def require(ok: bool, field: str, given: Any, allowed: str) -> None:
    """Refuse a value.

    Args:
        ok: Whether the value is allowed.
        field: Name of the argument, or its place in the user's config.
        given: The value.
        allowed: What is allowed, in words.

    Raises:
        ValueError: Not ``ok``.
    """
    if not ok:
        raise ValueError(f'{field}: got {given!r}, allowed: {allowed}')


def check_flag(field: str, value: Any) -> bool:
    """Check a flag.

    Args:
        field: Name of the argument.
        value: What was given.

    Returns:
        The value.

    Raises:
        ValueError: Anything but True and False.
    """
    require(isinstance(value, bool), field, value, 'True, False')
    return value


def check_number(field: str, value: Any, is_allowed: Callable[[float], bool], allowed: str) -> float:
    """Check a number.

    Args:
        field: Name of the argument.
        value: What was given.
        is_allowed: Tells of a finite number whether it is allowed.
        allowed: What is allowed, in words.

    Returns:
        The value.

    Raises:
        ValueError: No number, a flag, NaN, infinite, or not allowed.
    """
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    require(is_number and math.isfinite(value) and is_allowed(value), field, value, allowed)
    return value


def check_integer(field: str, value: Any, least: int) -> int:
    """Check an integer.

    Args:
        field: Name of the argument.
        value: What was given.
        least: Smallest value allowed.

    Returns:
        The value.

    Raises:
        ValueError: No integer, a flag, or too small.
    """
    is_integer = isinstance(value, Integral) and not isinstance(value, bool)
    require(is_integer and value >= least, field, value, f'integers from {least} up')
    return value


def check_choice(field: str, value: Any, choices: Iterable[str]) -> str:
    """Check a choice between names.

    Args:
        field: Name of the argument.
        value: What was given.
        choices: Names allowed.

    Returns:
        The value.

    Raises:
        ValueError: None of them.
    """
    names = list(choices)
    require(value in names, field, value, ', '.join(map(repr, names)))
    return value
