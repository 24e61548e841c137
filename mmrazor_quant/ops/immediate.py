"""Compiling without waiting: for work whose last bits must not depend on how long a process has been running."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from . import compiled


@contextlib.contextmanager
def immediate_mode() -> Iterator[None]:
    """Use compiled code from the first call on inside this context, in all threads.

    Otherwise a function runs in eager until compiling it has become worthwhile, and sums change their last bits then.
    """
    before, compiled.switch.patience = compiled.switch.patience, 0
    try:
        yield
    finally:
        compiled.switch.patience = before
