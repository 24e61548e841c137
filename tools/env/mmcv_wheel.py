"""Builds mmcv with its CPU ops once a machine and keeps the wheel in the user's cache.

mmcv 2.0.1 is the newest mmcv that both mmcls 1.0.0rc6 and mmdet 3.3 accept. It is published as source
only, and its build asks for C++14 where the headers of a current torch need C++17.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path

from checks import COMPILER_ADVICE
from console import Progress, SetupError, compiled_objects, run_logged
from locking import exclusive

# Part of the cache key: raise it when the way the wheel is built changes.
RECIPE = 1
MEMORY_PER_JOB = 2 * 1024**3


def cache_root() -> Path:
    """Returns this package's folder in the user's cache directory."""
    configured = Path(os.environ.get('XDG_CACHE_HOME', ''))
    # The XDG specification says to ignore a relative path.
    base = configured if configured.is_absolute() else Path.home() / '.cache'
    return base / 'mmrazor_quant'


def python_tag() -> str:
    """Returns the tag of the running Python, such as ``cp311``."""
    return 'cp' + sysconfig.get_python_version().replace('.', '')


def wheel_folder(mmcv_version: str, torch_version: str) -> Path:
    """Returns the cache folder for one combination of versions, Python and platform."""
    platform = sysconfig.get_platform()
    key = f'mmcv-{mmcv_version}-torch-{torch_version}-{python_tag()}-{platform}-r{RECIPE}'
    return cache_root() / 'wheels' / key


def cached_wheel(folder: Path) -> Path | None:
    """Returns the finished wheel in a cache folder, if there is one."""
    return next(iter(sorted(folder.glob('mmcv-*.whl'))), None)


def any_cached_wheel(mmcv_version: str, torch_pin: str) -> Path | None:
    """Looks for a wheel before torch is installed, when its local version (``+cpu``) is still unknown."""
    pattern = wheel_folder(mmcv_version, torch_pin + '*').name
    folders = sorted((cache_root() / 'wheels').glob(pattern))
    return next((wheel for wheel in map(cached_wheel, folders) if wheel), None)


def ensure_wheel(python: Path, mmcv_version: str, torch_version: str, compiler: str | None, progress: Progress) -> Path:
    """Returns the cached mmcv wheel and builds it first where it is missing.

    Args:
        python: Python of the virtual environment; torch and the build tools are installed in it.
        mmcv_version: Version of mmcv to build.
        torch_version: Version of torch in the environment, with its local part.
        compiler: C++ compiler to use.
        progress: Where the lines of progress go.

    Raises:
        SetupError: There is no compiler, or the build failed.
    """
    folder = wheel_folder(mmcv_version, torch_version)
    wheel = cached_wheel(folder)
    if wheel is None:
        folder.mkdir(parents=True, exist_ok=True)
        with exclusive(folder / 'lock', progress, 'another set-up is building the same wheel'):
            # Whoever held the lock before may have finished it.
            wheel = cached_wheel(folder) or build(folder, python, mmcv_version, compiler, progress)
    progress.note(f'wheel: {wheel}')
    return wheel


def build(folder: Path, python: Path, version: str, compiler: str | None, progress: Progress) -> Path:
    """Builds the wheel below ``folder`` and moves it into place in one step.

    The source tree stays after an interrupted build: ninja then compiles only what is missing.
    """
    if compiler is None:
        raise SetupError('mmcv has to be compiled and no C++ compiler was found', COMPILER_ADVICE)
    source = patched_source(folder, python, version, progress)
    output = folder / 'output'
    jobs = os.environ.get('MAX_JOBS') or str(parallel_jobs())
    progress.note(f'compiling mmcv {version} with CPU ops, {jobs} jobs (about 8 minutes on 2 cores, once a machine)')
    run_logged(
        [str(python), '-m', 'pip', 'wheel', '-v', '--no-build-isolation', '--no-deps', '--no-cache-dir']
        + ['--wheel-dir', str(output), str(source)],
        folder / 'build.log',
        progress,
        failure=f'building mmcv {version}',
        advice='Look for the first "error:" in that log. Running the same command again continues the build; '
        f'to start it afresh, remove {folder}.',
        describe=compiled_objects,
        env=build_environment(python, compiler, jobs),
    )
    built = next(iter(output.glob('mmcv-*.whl')))
    wheel = folder / built.name
    os.replace(built, wheel)
    shutil.rmtree(source)
    shutil.rmtree(output)
    return wheel


def build_environment(python: Path, compiler: str, jobs: str) -> dict[str, str]:
    """Returns the environment of the build: with ops, without CUDA, ninja from the virtual environment."""
    return {
        **os.environ,
        'PATH': os.pathsep.join([str(python.parent), os.environ.get('PATH', '')]),
        'CXX': compiler,
        'MMCV_WITH_OPS': '1',
        'MAX_JOBS': jobs,
        # With a GPU in sight mmcv would want nvcc as well.
        'FORCE_CUDA': '0',
        'CUDA_VISIBLE_DEVICES': '',
    }


def parallel_jobs() -> int:
    """Returns how many compilers fit this machine's cores and memory."""
    memory = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
    return max(1, min(available_cores(), memory // MEMORY_PER_JOB))


def available_cores() -> int:
    """Returns the number of cores this process may use."""
    if hasattr(os, 'sched_getaffinity'):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def patched_source(folder: Path, python: Path, version: str, progress: Progress) -> Path:
    """Returns mmcv's source tree, downloaded and patched where it is not there yet."""
    source = folder / 'source'
    if source.exists():
        progress.note('continuing the build that was interrupted')
        return source
    with tempfile.TemporaryDirectory(dir=folder, prefix='download-') as scratch:
        run_logged(
            [str(python), '-m', 'pip', 'download', '--no-deps', '--no-binary', 'mmcv', '--no-build-isolation']
            + ['--dest', scratch, f'mmcv=={version}'],
            folder / 'download.log',
            progress,
            failure=f'downloading the source of mmcv {version}',
            advice='Check the network connection and the package index pip is configured for.',
        )
        archive = next(iter(Path(scratch).glob('mmcv-*.tar.gz')))
        shutil.unpack_archive(str(archive), scratch)
        unpacked = Path(scratch) / f'mmcv-{version}'
        ask_for_cxx17(unpacked / 'setup.py')
        os.replace(unpacked, source)
    return source


def ask_for_cxx17(setup_file: Path) -> None:
    """Replaces C++14 by C++17 in mmcv's build flags: the headers of a current torch need it."""
    text = setup_file.read_text(encoding='utf-8')
    setup_file.write_text(text.replace('std=c++14', 'std=c++17'), encoding='utf-8')


def installed_version(python: Path, package: str) -> str:
    """Returns the version of a package in the virtual environment, with its local part."""
    code = f'import importlib.metadata as m; print(m.version({package!r}))'
    return subprocess.run([str(python), '-c', code], check=True, capture_output=True, text=True).stdout.strip()
