"""What the set-up prints, and how it runs commands that take a while.

Standard library only: this runs before anything is installed.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

HEARTBEAT_SECONDS = 15.0
TAIL_BYTES = 64 * 1024
SHOWN_LOG_LINES = 15
SHOWN_LINE_WIDTH = 200


class SetupError(Exception):
    """A step could not be done.

    Args:
        problem: What failed, in one sentence.
        advice: What the user can do about it.
        log: The log file of the command that failed, where there is one.
    """

    def __init__(self, problem: str, advice: str, log: Path | None = None) -> None:
        super().__init__(problem)
        self.problem = problem
        self.advice = advice
        self.log = log

    def report(self) -> str:
        """Formats the error for the terminal, with the end of the log."""
        lines = [f'set-up failed: {self.problem}']
        if self.log is not None:
            lines.append(f'the last lines of {self.log}:')
            lines += [f'  | {line[:SHOWN_LINE_WIDTH]}' for line in tail(self.log)[-SHOWN_LOG_LINES:]]
        lines.append(f'what to do: {self.advice}')
        return '\n'.join(lines)


class Progress:
    """Numbers the steps and prints the time since the start.

    Args:
        total: How many steps there will be.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self.done = 0
        self.start = time.monotonic()

    def step(self, title: str) -> None:
        """Announces the next step."""
        self.done += 1
        print(f'[{self.done}/{self.total}] {self.elapsed()}  {title}', flush=True)

    def note(self, text: str) -> None:
        """Prints a line below the current step."""
        print(f'      {self.elapsed()}  {text}', flush=True)

    def elapsed(self) -> str:
        """Returns the time since the start as ``m:ss``."""
        minutes, seconds = divmod(int(time.monotonic() - self.start), 60)
        return f'{minutes}:{seconds:02d}'


def tail(log: Path) -> list[str]:
    """Returns the last non-empty lines of a log that may still be growing."""
    if not log.exists():
        return []
    with log.open('rb') as stream:
        stream.seek(max(0, log.stat().st_size - TAIL_BYTES))
        text = stream.read().decode(errors='replace')
    return [line.rstrip() for line in text.splitlines() if line.strip()]


def last_line(log: Path) -> str:
    """Describes a running command by the last line it wrote."""
    lines = tail(log)
    return lines[-1].strip()[:100] if lines else 'running'


def compiled_objects(log: Path) -> str:
    """Describes a running build by ninja's own counter, ``[k/n]``."""
    counters = [match for match in (re.match(r'\s*\[(\d+)/(\d+)\]', line) for line in tail(log)) if match]
    if not counters:
        return last_line(log)
    return f'{counters[-1][1]} of {counters[-1][2]} files compiled'


def run_logged(
    command: list[str],
    log: Path,
    progress: Progress,
    *,
    failure: str,
    advice: str,
    describe: Callable[[Path], str] = last_line,
    env: dict[str, str] | None = None,
) -> None:
    """Runs a command into a log file, with a line of progress now and then.

    The output goes to a file and not through a pipe, so that a command whose parent was killed
    does not die half way of a closed pipe.

    Args:
        command: Program and arguments.
        log: File that receives the command's output.
        progress: Where the lines of progress go.
        failure: What to say failed if the command fails.
        advice: What to tell the user to do in that case.
        describe: Turns the log so far into a line of progress.
        env: Environment variables of the command, if not this process's.

    Raises:
        SetupError: The command returned a non-zero status.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open('wb') as sink:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            # Python opens files non-inheritable; what passes are the locks of locking.py, on purpose.
            close_fds=False,
            env=env,
        )
        try:
            wait_with_heartbeat(process, lambda: progress.note(describe(log)))
        except BaseException:
            stop_group(process)
            raise
    if process.returncode != 0:
        raise SetupError(f'{failure} ({describe_status(process.returncode)})', advice_from_log(log) or advice, log)


def describe_status(returncode: int) -> str:
    """Says how a command ended: nothing in its log tells that it was killed."""
    return f'exit status {returncode}' if returncode >= 0 else f'killed by {signal.Signals(-returncode).name}'


def wait_with_heartbeat(process: subprocess.Popen[bytes], beat: Callable[[], None]) -> None:
    """Waits for a process and calls ``beat`` every ``HEARTBEAT_SECONDS``."""
    while True:
        try:
            process.wait(timeout=HEARTBEAT_SECONDS)
            return
        except subprocess.TimeoutExpired:
            beat()


def stop_group(process: subprocess.Popen[bytes]) -> None:
    """Ends a process and everything it started (compilers, for one)."""
    if process.poll() is not None:
        return
    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def advice_from_log(log: Path) -> str | None:
    """Recognises a few common causes in a log and says what to do about them."""
    text = '\n'.join(tail(log))
    known = {
        'No space left on device': 'Free some disk space (about 4 GB are needed) and run the same command again.',
        'Temporary failure in name resolution': 'Check the network connection and run the same command again.',
        'Connection refused': 'Check the network connection and the proxy settings, then run the same command again.',
        'Killed signal terminated program': 'The compiler ran out of memory: run again with MAX_JOBS=1.',
        'No matching distribution found': (
            'This Python or platform has no build of a pinned package: use Python 3.11 on Linux, '
            'or check the package index pip is configured for (pip config list).'
        ),
    }
    return next((advice for sign, advice in known.items() if sign in text), None)
