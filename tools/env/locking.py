"""A file lock that outlives neither its holder nor the processes it started."""

from __future__ import annotations

import contextlib
import fcntl
import time
from collections.abc import Iterator
from pathlib import Path

from console import HEARTBEAT_SECONDS, Progress


@contextlib.contextmanager
def exclusive(path: Path, progress: Progress, reason: str) -> Iterator[int]:
    """Holds a file lock and says so while it has to wait for it.

    The lock belongs to the open file: it goes away with the last process that has it open, so a
    killed set-up leaves nothing behind to clean up.

    Args:
        path: File to lock, created where it is missing.
        progress: Where the lines of progress go.
        reason: What is being waited for.

    Yields:
        The file descriptor of the lock, for child processes that must keep it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open('w') as stream:
        reported = -HEARTBEAT_SECONDS
        while not try_lock(stream.fileno()):
            if time.monotonic() - reported >= HEARTBEAT_SECONDS:
                reported = time.monotonic()
                progress.note(f'waiting: {reason}')
            time.sleep(0.5)
        yield stream.fileno()


def try_lock(descriptor: int) -> bool:
    """Takes a file lock if it is free."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
