"""A file lock that is held until the last process that works under it has ended."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

from console import HEARTBEAT_SECONDS, Progress


@contextlib.contextmanager
def exclusive(path: Path, progress: Progress, reason: str) -> Iterator[None]:
    """Holds a file lock and says so while it has to wait for it.

    The lock belongs to the open file, and commands started meanwhile inherit it: a pip or a compiler
    that outlives a killed set-up keeps others out until it is done, and then nothing is left to clean up.

    Args:
        path: File to lock, created where it is missing.
        progress: Where the lines of progress go.
        reason: What is being waited for.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open('w') as stream:
        reported = -HEARTBEAT_SECONDS
        while not try_lock(stream.fileno()):
            if time.monotonic() - reported >= HEARTBEAT_SECONDS:
                reported = time.monotonic()
                progress.note(f'waiting: {reason}')
            time.sleep(0.5)
        os.set_inheritable(stream.fileno(), True)
        yield


def try_lock(descriptor: int) -> bool:
    """Takes a file lock if it is free."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
