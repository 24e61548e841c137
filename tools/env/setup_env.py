"""Sets up the project's virtual environment: ``python3.11 tools/env/setup_env.py``.

Creates ``.venv`` (another folder with the environment variable MMRAZOR_QUANT_VENV), installs the versions
pinned in ``requirements/constraints.txt``, compiles mmcv once a machine into the user's cache directory,
and installs this package in editable mode. Running it again does nothing unless something it depends on
has changed; after an interruption it continues.

Standard library only: this runs before anything is installed.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType
from urllib.parse import unquote

from checks import check_compiler, check_disk, check_python, check_venv_module, find_compiler
from console import Progress, SetupError, run_logged
from locking import exclusive
from mmcv_wheel import any_cached_wheel, cache_root, ensure_wheel, installed_version

REPOSITORY = Path(__file__).resolve().parents[2]
CONSTRAINTS = REPOSITORY / 'requirements' / 'constraints.txt'
SCRIPTS = Path(__file__).resolve().parent
STEPS = 7
# mmcv's build needs them, and a current pip explains a failed download better than the one Python brings.
BUILD_TOOLS = ('pip', 'setuptools', 'wheel', 'ninja', 'numpy')
INSTALL_ADVICE = 'Check the network connection and the package index of pip, then run the same command again.'


class Environment:
    """The virtual environment and the files kept in it.

    Args:
        folder: Where the environment is or will be.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.python = folder / 'bin' / 'python'
        self.stamp = folder / 'mmrazor_quant.stamp'
        self.logs = folder / 'setup-logs'

    def is_current(self) -> bool:
        """Tells whether a finished set-up of exactly these pins is in place."""
        return self.stamp.exists() and self.stamp.read_text() == self.digest() and self.python_version() is not None

    def digest(self) -> str:
        """Identifies everything that decides what the environment contains."""
        files = [REPOSITORY / 'setup.py', REPOSITORY / 'requirements.txt', *sorted(SCRIPTS.glob('*.py'))]
        files += sorted((REPOSITORY / 'requirements').glob('*.txt'))
        digest = hashlib.sha256(f'{sys.version_info[:3]} {self.folder} {REPOSITORY}'.encode())
        for path in files:
            digest.update(path.name.encode() + path.read_bytes())
        return digest.hexdigest()

    def python_version(self) -> str | None:
        """Returns ``major.minor`` of the environment's Python, or None where it does not run."""
        if not self.python.exists():
            return None
        code = 'import sys; print("%d.%d" % sys.version_info[:2])'
        probe = subprocess.run([str(self.python), '-c', code], capture_output=True, text=True, check=False)
        return probe.stdout.strip() if probe.returncode == 0 else None

    def has_pip(self) -> bool:
        """Tells whether pip runs in the environment."""
        probe = subprocess.run([str(self.python), '-m', 'pip', '--version'], capture_output=True, check=False)
        return probe.returncode == 0


def main() -> int:
    """Sets the environment up and returns the exit status."""
    for signum in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, interrupt)
    environment = Environment(Path(os.environ.get('MMRAZOR_QUANT_VENV') or REPOSITORY / '.venv').absolute())
    progress = Progress(STEPS)
    try:
        if not environment.is_current():
            with exclusive(lock_path(environment), progress, f'another set-up is at work in {environment.folder}'):
                # Whoever held the lock before may have done all of it.
                if not environment.is_current():
                    set_up(environment, progress)
        print(f'environment up to date: {environment.folder}')
    except SetupError as error:
        print(error.report(), file=sys.stderr)
        return 1
    except OSError as error:
        advice = 'Check free disk space and permissions (XDG_CACHE_HOME moves the cache), then run it again.'
        print(SetupError(str(error), advice).report(), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print('\nset-up interrupted; running the same command again continues it', file=sys.stderr)
        return 130
    return 0


def interrupt(signum: int, frame: FrameType | None) -> None:
    """Treats a request to end like Ctrl-C, so that running compilers are ended as well."""
    raise KeyboardInterrupt


def lock_path(environment: Environment) -> Path:
    """Returns the lock of one environment; it lies outside, as the folder may be created anew."""
    name = hashlib.sha256(str(environment.folder).encode()).hexdigest()[:16]
    return cache_root() / 'locks' / f'{name}.lock'


def set_up(environment: Environment, progress: Progress) -> None:
    """Runs all steps."""
    pins = read_pins(CONSTRAINTS)
    compiler = check_machine(environment, pins, progress)
    create(environment, progress)
    environment.stamp.unlink(missing_ok=True)
    install_torch(environment, pins, progress)
    install_pins(environment, pins, progress)
    install_mmcv(environment, pins['mmcv'], compiler, progress)
    install_package(environment, progress)
    verify(environment, progress)
    environment.stamp.write_text(environment.digest())
    progress.note('done')


def read_pins(path: Path) -> dict[str, str]:
    """Reads the ``name==version`` lines of a constraints file."""
    lines = (line.split('#')[0].strip() for line in path.read_text(encoding='utf-8').splitlines())
    return dict(line.split('==') for line in lines if line)


def check_machine(environment: Environment, pins: dict[str, str], progress: Progress) -> str | None:
    """Step 1: looks for everything that would otherwise be missed after minutes of work.

    Returns:
        The C++ compiler, or None where none is needed.
    """
    progress.step('checking Python, compiler and disk space')
    check_python(progress)
    check_venv_module()
    if not environment.folder.exists():
        check_disk(environment.folder)
    if any_cached_wheel(pins['mmcv'], pins['torch']) is None:
        return check_compiler()
    compiler = find_compiler()
    if compiler is None:
        progress.note('warning: no C++17 compiler; torch.compile, which makes quantization faster, needs one')
    return compiler


def create(environment: Environment, progress: Progress) -> None:
    """Step 2: creates the virtual environment, keeping one that works."""
    progress.step(f'virtual environment {environment.folder}')
    wanted = '{}.{}'.format(*sys.version_info[:2])
    found = environment.python_version()
    if found == wanted and environment.has_pip():
        progress.note('already there, completing it')
        return
    if found is not None and found != wanted:
        raise SetupError(
            f'{environment.folder} belongs to Python {found}, this is Python {wanted}',
            f'Remove {environment.folder}, or run "make env PYTHON=python{found}".',
        )
    remove_broken(environment.folder, progress)
    run_logged(
        [sys.executable, '-m', 'venv', str(environment.folder)],
        cache_root() / 'logs' / 'venv.log',
        progress,
        failure='creating the virtual environment',
        advice='Check that the folder can be written and that Python has its venv module.',
    )


def remove_broken(folder: Path, progress: Progress) -> None:
    """Removes a virtual environment that does not run, and refuses to remove anything else."""
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not (folder / 'pyvenv.cfg').exists():
        raise SetupError(f'{folder} exists and is no virtual environment', 'Remove it or set MMRAZOR_QUANT_VENV.')
    progress.note('it does not run: creating it anew')
    shutil.rmtree(folder)


def install_torch(environment: Environment, pins: dict[str, str], progress: Progress) -> None:
    """Step 3: installs the build tools and torch."""
    progress.step(f'installing the build tools and torch {pins["torch"]}')
    remove = f'Remove {environment.folder} and run the same command again.'
    script(environment, 'repair.py', progress, 'repairing an interrupted installation', remove)
    tools = [f'{name}=={pins[name]}' for name in BUILD_TOOLS]
    pip_install(environment, ['--no-deps', *tools], 'build-tools', progress)
    # torch is let bring packages of its own: its CUDA build needs some that its CPU build does not know.
    torch = f'torch=={pins["torch"]}'
    pip_install(environment, ['--constraint', str(CONSTRAINTS), torch], 'torch', progress)


def install_pins(environment: Environment, pins: dict[str, str], progress: Progress) -> None:
    """Step 4: installs the other pinned packages, and only those.

    Dependencies are left out because the pins are complete, and because mmengine would bring the
    opencv-python that does not import on a machine without libGL.
    """
    packages = [f'{name}=={version}' for name, version in pins.items() if name not in (*BUILD_TOOLS, 'torch', 'mmcv')]
    progress.step(f'installing {len(packages)} pinned packages')
    pip_install(environment, ['--no-deps', *packages], 'pinned-packages', progress)


def install_mmcv(environment: Environment, version: str, compiler: str | None, progress: Progress) -> None:
    """Step 5: installs mmcv from the cached wheel, building that first where it is missing."""
    torch_version = installed_version(environment.python, 'torch')
    progress.step(f'mmcv {version} for torch {torch_version}')
    wheel = ensure_wheel(environment.python, version, torch_version, compiler, progress)
    if not installed_from(environment, wheel):
        pip_install(environment, ['--no-deps', '--force-reinstall', str(wheel)], 'mmcv', progress)


def installed_from(environment: Environment, wheel: Path) -> bool:
    """Tells whether the installed mmcv came from this very wheel and not from one for another torch."""
    name = '-'.join(wheel.name.split('-')[:2])
    origins = environment.folder.glob(f'lib/python*/site-packages/{name}.dist-info/direct_url.json')
    # The path names the versions of mmcv and torch; in the URL, the "+" of a local version is quoted.
    return any(str(wheel) in unquote(path.read_text()) for path in origins)


def install_package(environment: Environment, progress: Progress) -> None:
    """Step 6: installs this package in editable mode."""
    progress.step('installing mmrazor_quant in editable mode')
    pip_install(environment, ['--no-deps', '--no-build-isolation', '--editable', str(REPOSITORY)], 'package', progress)


def verify(environment: Environment, progress: Progress) -> None:
    """Step 7: imports the stack."""
    progress.step('checking that everything imports')
    advice = f'Remove {environment.folder} and run the same command again; if it stays, remove {cache_root()} too.'
    script(environment, 'verify.py', progress, 'the installed packages do not work together', advice)


def pip_install(environment: Environment, arguments: list[str], name: str, progress: Progress) -> None:
    """Runs ``pip install`` in the environment."""
    command = [str(environment.python), '-m', 'pip', 'install', '--disable-pip-version-check', *arguments]
    log = environment.logs / f'{name}.log'
    run_logged(command, log, progress, failure=f'pip install ({name})', advice=INSTALL_ADVICE)


def script(environment: Environment, name: str, progress: Progress, failure: str, advice: str) -> None:
    """Runs one of the scripts next to this file in the environment."""
    command = [str(environment.python), str(SCRIPTS / name)]
    run_logged(command, environment.logs / f'{name}.log', progress, failure=failure, advice=advice)


if __name__ == '__main__':
    sys.exit(main())
