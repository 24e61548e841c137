"""Keeping the memory of one step for the next one.

glibc gives memory at the end of its heap, and large blocks anywhere, back to the system as soon as they are free. A
step of training then gets its activations page by page from the system again, each time; whether it does hangs on what
happens to lie at the end of the heap.
"""

from __future__ import annotations

import ctypes
import os
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Numbers of mallopt's parameters, from malloc.h."""

_NEVER_TRIM = -1
_LARGEST_IN_HEAP = 2**30

_VARIABLES = ('MALLOC_TRIM_THRESHOLD_', 'MALLOC_MMAP_THRESHOLD_', 'GLIBC_TUNABLES')
"""Environment variables that set the same."""


def keep_freed_memory() -> bool:
    """Let this process keep the memory that it frees, for its next allocations.

    Its resident size then stays at its peak. What the environment variables of glibc say comes first.

    Returns:
        Whether anything was set: not on systems without glibc.
    """
    if sys.platform != 'linux' or any(name in os.environ for name in _VARIABLES):
        return False
    mallopt = getattr(ctypes.CDLL(None), 'mallopt', None)
    if mallopt is None:
        return False
    return bool(mallopt(_MMAP_THRESHOLD, _LARGEST_IN_HEAP)) and bool(mallopt(_TRIM_THRESHOLD, _NEVER_TRIM))
