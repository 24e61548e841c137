"""What the machine must have, looked at before any long work starts."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from console import Progress, SetupError

TESTED_PYTHON = (3, 11)
# The pinned numpy needs 3.11; mmcv 2.0.1 cannot be built without setuptools' pkg_resources beyond 3.13.
OLDEST_PYTHON = (3, 11)
NEWEST_PYTHON = (3, 13)
GIGABYTE = 1024**3
ENVIRONMENT_GIGABYTES = 4

COMPILER_ADVICE = (
    'Install a C++17 compiler (g++ 9 or newer, or clang++), for instance with "apt-get install g++", or name one '
    'in the environment variable CXX, then run the same command again.'
)


def check_python(progress: Progress) -> None:
    """Refuses a Python that the pinned packages do not support, and warns of an untested one."""
    version = sys.version_info[:2]
    name = '.'.join(map(str, version))
    if not OLDEST_PYTHON <= version <= NEWEST_PYTHON:
        raise SetupError(
            f'the pinned packages do not install on Python {name} ({sys.executable})',
            'Install Python 3.11 and run "make env PYTHON=python3.11".',
        )
    if version != TESTED_PYTHON:
        progress.note(f'warning: the pinned packages are tested on Python 3.11 only, this is {name}')


def check_venv_module() -> None:
    """Refuses a Python that cannot create virtual environments (some distributions split it off)."""
    probe = subprocess.run([sys.executable, '-c', 'import venv, ensurepip'], capture_output=True, check=False)
    if probe.returncode != 0:
        name = '.'.join(map(str, sys.version_info[:2]))
        raise SetupError(
            f'{sys.executable} has no venv module',
            f'Install it, for instance with "apt-get install python{name}-venv", and run the same command again.',
        )


def check_disk(folder: Path) -> None:
    """Refuses to start with too little room for the environment."""
    existing = next(path for path in [folder, *folder.parents] if path.exists())
    free = shutil.disk_usage(existing).free / GIGABYTE
    if free < ENVIRONMENT_GIGABYTES:
        raise SetupError(
            f'only {free:.1f} GB of disk space are free at {existing}',
            f'Free at least {ENVIRONMENT_GIGABYTES} GB, or set MMRAZOR_QUANT_VENV to a folder on another disk.',
        )


def find_compiler() -> str | None:
    """Returns the command of a C++17 compiler that works, if there is one."""
    candidates = [os.environ['CXX']] if os.environ.get('CXX') else ['c++', 'g++', 'clang++']
    return next((name for name in candidates if compiles(name, '#include <optional>')), None)


def check_compiler() -> str:
    """Returns a C++17 compiler that can build Python extensions.

    Raises:
        SetupError: There is none, or the headers of this Python are missing.
    """
    compiler = find_compiler()
    if compiler is None:
        raise SetupError('mmcv has to be compiled and no working C++17 compiler was found', COMPILER_ADVICE)
    if not compiles(compiler, '#include <Python.h>'):
        name = '.'.join(map(str, sys.version_info[:2]))
        raise SetupError(
            f'mmcv has to be compiled and Python.h of {sys.executable} was not found',
            f'Install it, for instance with "apt-get install python{name}-dev", and run the same command again.',
        )
    return compiler


def compiles(compiler: str, code: str) -> bool:
    """Tells whether a compiler accepts a piece of C++17."""
    command = shlex.split(compiler)
    if shutil.which(command[0]) is None:
        return False
    options = ['-std=c++17', '-fsyntax-only', '-I', sysconfig.get_path('include'), '-x', 'c++', '-']
    probe = subprocess.run([*command, *options], input=code, text=True, capture_output=True, check=False)
    return probe.returncode == 0
