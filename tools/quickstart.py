"""Train a small network on handwritten digits, quantize it in three ways, deploy it, and compare: make quickstart

Everything is done by the tools train.py, test.py and export.py, on the configs in configs/quickstart; each command is
shown. The data ship with scikit-learn. Each run starts afresh in work_dirs/quickstart.

The tools run on one thread: a network this small gains nothing from more, and on a busy machine they would wait for
each other.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
PROGRESS = re.compile(
    r'(?: - )?(Epoch\((?:train|val|test)\).*|Calibration \[.*|QAT from .*|Saved the .*|same class: .*)'
)
"""What is shown of a tool's log."""
SECONDS_BETWEEN_LINES = 2.0
LINES_OF_FAILURE = 15
BACKEND = 'onnxruntime'
"""Runs the quantized networks; the configs place quantizers for it."""


@dataclass(frozen=True)
class Setting:
    """One line of the table.

    Args:
        title: how it is called there.
        config: name of its config in configs/quickstart.
        is_trained: whether tools/train.py comes before tools/test.py.
    """

    title: str
    config: str
    is_trained: bool


SETTINGS = (
    Setting('float', 'float', is_trained=True),
    Setting('PTQ, 8-bit weights and activations', 'ptq_w8a8', is_trained=False),
    Setting('PTQ, 4-bit weights and activations', 'ptq_w4a4', is_trained=False),
    Setting('QAT, 4-bit weights and activations', 'qat_w4a4', is_trained=True),
)


@dataclass(frozen=True)
class Result:
    """What is shown of a setting.

    Args:
        title: the setting.
        top1: accuracy on the test split in percent, in PyTorch.
        deployed: the same of the file that the backend runs; None: not deployed.
        size: bytes of the stored model.
        seconds: of all its commands.
    """

    title: str
    top1: float
    deployed: float | None
    size: int
    seconds: float


class CommandError(RuntimeError):
    """A command failed."""


class Quickstart:
    """The commands of one run.

    Args:
        folder: where the commands run and leave work_dirs/quickstart.
        epochs: epochs to train, instead of those of the configs.
    """

    def __init__(self, folder: Path, epochs: int | None) -> None:
        self.folder = folder
        self.epochs = epochs
        self.results = folder / 'work_dirs' / 'quickstart'

    def start_afresh(self) -> None:
        """Removes what an earlier run left."""
        if self.results.exists():
            print(f'removing the results of an earlier run in {self.shown(self.results)}')
            shutil.rmtree(self.results)
        self.results.mkdir(parents=True)

    def run(self, setting: Setting) -> Result:
        """Trains, tests and deploys one setting."""
        start = time.perf_counter()
        config = REPOSITORY / 'configs' / 'quickstart' / f'{setting.config}.py'
        metrics = self.results / setting.config / 'metrics.json'
        if setting.is_trained:
            self.command(setting, 'train.py', config, *self.train_options(setting))
            checkpoint = self.checkpoint(setting)
            self.command(setting, 'test.py', config, checkpoint, '--out', metrics, *self.float_options(setting))
        else:
            self.command(setting, 'test.py', config, '--out', metrics, *self.float_options(setting))
            checkpoint = self.results / setting.config / 'quantized.pth'
        deployed = None if setting is SETTINGS[0] else self.deploy(setting, config, checkpoint)
        seconds = time.perf_counter() - start
        return Result(setting.title, read_top1(metrics), deployed, stored_bytes(config, checkpoint), seconds)

    def deploy(self, setting: Setting, config: Path, checkpoint: Path) -> float:
        """Exports a quantized checkpoint and evaluates the file; returns its accuracy."""
        folder = self.results / setting.config / BACKEND
        metrics, options = folder / 'metrics.json', self.float_options(setting)
        self.command(setting, 'export.py', config, checkpoint, '--backend', BACKEND, '--out', folder, *options)
        self.command(
            setting, 'test.py', config, checkpoint, '--backend', BACKEND, '--model', folder, '--out', metrics, *options,
            log='deployed',
        )  # fmt: skip
        return read_top1(metrics)

    def checkpoint(self, setting: Setting) -> Path:
        """Returns the last checkpoint of a training."""
        path = Path((self.results / setting.config / 'last_checkpoint').read_text(encoding='utf-8').strip())
        return path if path.is_absolute() else self.folder / path

    def train_options(self, setting: Setting) -> list[str]:
        """Returns the options of a training that is shorter than its config says."""
        options = [] if self.epochs is None else [f'train_cfg.max_epochs={self.epochs}']
        return with_flag(options + self._float_checkpoint(setting))

    def float_options(self, setting: Setting) -> list[str]:
        """Returns the options that name the float checkpoint, where it is not the one in the config."""
        return with_flag(self._float_checkpoint(setting))

    def _float_checkpoint(self, setting: Setting) -> list[str]:
        is_float = setting is SETTINGS[0]
        if self.epochs is None or is_float:
            return []
        return [f'model.float_checkpoint={self.checkpoint(SETTINGS[0])}']

    def command(self, setting: Setting, tool: str, *arguments: Path | str, log: str | None = None) -> None:
        """Runs one of the tools; its output goes to a log, of which the progress is shown.

        Args:
            setting: what it is run for.
            tool: name of the script.
            *arguments: words of its command line.
            log: what the log is called; None: as the tool.

        Raises:
            CommandError: it failed; the end of its log is shown.
        """
        words = [self.shown(word) if isinstance(word, Path) else word for word in arguments]
        script = self.shown(REPOSITORY / 'tools' / tool)
        log = self.results / f'{setting.config}.{log or tool.removesuffix(".py")}.log'
        print(f'\n$ python {shlex.join([script, *words])}', flush=True)
        status = self._run_logged([sys.executable, script, *words], log)
        if status != 0:
            end = log.read_text(encoding='utf-8').splitlines()[-LINES_OF_FAILURE:]
            raise CommandError(
                '\n'.join(end) + f'\n\nfailed with status {status}: python {shlex.join([script, *words])}\n'
                f'the whole log: {log}'
            )

    def _run_logged(self, command: list[str], log: Path) -> int:
        with log.open('w', encoding='utf-8') as file:
            process = subprocess.Popen(
                command,
                cwd=self.folder,
                env={'OMP_NUM_THREADS': '1', **os.environ},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors='replace',
            )
            try:
                for line in progress_of(tee(process.stdout, file)):
                    print(f'    {line}', flush=True)
                return process.wait()
            finally:
                process.kill()
                process.wait()

    def shown(self, path: Path) -> str:
        """Returns a path as one would type it in the folder."""
        return os.path.relpath(path, self.folder) if path.is_relative_to(self.folder) else str(path)


def read_top1(metrics: Path) -> float:
    """Reads the accuracy from what tools/test.py --out wrote."""
    return json.loads(metrics.read_text(encoding='utf-8'))['accuracy/top1']


def with_flag(options: list[str]) -> list[str]:
    """Puts ``--cfg-options`` before options, if there are any."""
    return ['--cfg-options', *options] if options else []


def tee(lines: Any, file: Any) -> Iterator[str]:
    """Yields lines and writes them to a file."""
    for line in lines:
        file.write(line)
        file.flush()
        yield line


def progress_of(lines: Iterator[str]) -> Iterator[str]:
    """Yields what a log says of progress, not more often than one can read."""
    last = 0.0
    for line in lines:
        found = PROGRESS.search(line)
        is_frequent = found is not None and found[1].startswith('Epoch(train)')
        if found and not (is_frequent and time.monotonic() - last < SECONDS_BETWEEN_LINES):
            last = time.monotonic()
            yield re.sub(r'\s+(data_time|time): \S+', '', found[1]).strip()


def stored_bytes(config: Path, checkpoint: Path) -> int:
    """Computes the size of a model from its checkpoint, with the formula in mmrazor_quant/analysis/size.py."""
    from mmengine.config import Config
    from mmengine.registry import MODELS, init_default_scope
    from mmengine.runner import load_checkpoint

    from mmrazor_quant.analysis.size import model_size
    from mmrazor_quant.engine.launch import register_codebase

    cfg = Config.fromfile(str(config))
    register_codebase(cfg.default_scope)
    init_default_scope(cfg.default_scope)
    cfg.model.data_preprocessor = cfg.data_preprocessor
    if 'float_checkpoint' in cfg.model:
        cfg.model.float_checkpoint = None
    model = MODELS.build(cfg.model)
    load_checkpoint(model, str(checkpoint), map_location='cpu', strict=True, logger='silent')
    return model_size(model).total


def silence() -> None:
    """Keeps what mmengine logs out of the output of this process."""
    from mmengine.logging import MMLogger

    MMLogger.get_instance('quickstart', logger_name='mmengine', log_level='ERROR')


def table(results: list[Result]) -> str:
    """Lays out the results."""
    width = max(len(r.title) for r in results)
    titles = f'{"top-1 %":>8}  {"deployed":>8}  {"size, bytes":>12}  {"of float":>8}  {"seconds":>8}'
    lines = [f'{"setting":<{width}}  {titles}']
    for r in results:
        deployed = '-' if r.deployed is None else f'{r.deployed:.2f}'
        numbers = f'{r.top1:>8.2f}  {deployed:>8}  {r.size:>12,}  {r.size / results[0].size:>8.1%}  {r.seconds:>8.1f}'
        lines.append(f'{r.title:<{width}}  {numbers}')
    return '\n'.join(lines)


def parse_args() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--folder', type=Path, default=REPOSITORY, help='where to put work_dirs/quickstart')
    parser.add_argument('--epochs', type=int, help='train this many epochs instead of those in the configs')
    return parser.parse_args()


def interrupt(signum: int, frame: Any) -> None:
    """Treats a request to end like Ctrl-C, so that the tool at work is ended as well."""
    raise KeyboardInterrupt


def main() -> int:
    """Runs the quickstart and returns the exit status."""
    args = parse_args()
    warnings.filterwarnings('ignore', message='pkg_resources is deprecated')
    signal.signal(signal.SIGTERM, interrupt)
    quickstart = Quickstart(args.folder.resolve(), args.epochs)
    start = time.perf_counter()
    results = []
    try:
        quickstart.start_afresh()
        print(f'python is {sys.executable}')
        silence()
        for number, setting in enumerate(SETTINGS, 1):
            print(f'\n[{number}/{len(SETTINGS)}] {setting.title}', end='', flush=True)
            results.append(quickstart.run(setting))
    except CommandError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print('\ninterrupted; the next run starts afresh', file=sys.stderr)
        return 130
    print(f'\nHandwritten digits, 600 test images; {time.perf_counter() - start:.0f} s in all\n')
    print(table(results))
    print(closing_words(quickstart))
    return 0


def closing_words(quickstart: Quickstart) -> str:
    """Says where everything is and what comes next."""
    folder = quickstart.shown(quickstart.results)
    return f"""
Deployed: top-1 of the file that ONNX Runtime runs, {folder}/<config>/{BACKEND}.
Size: weights as packed integers, scales and zero points, the rest in float32 (mmrazor_quant/analysis/size.py).
Checkpoints and logs: {folder}/<config>/*.pth, {folder}/*.log

What next:
  see how a config is built up      configs/quickstart/*.py, each says what it changes in another
  evaluate a quantized checkpoint   python tools/test.py configs/quickstart/ptq_w8a8.py \\
                                      {folder}/ptq_w8a8/quantized.pth
  try other bits                    python tools/test.py configs/quickstart/ptq_w8a8.py --work-dir work_dirs/w3a8 \\
                                      --cfg-options model.quantizer.qconfig.w_qscheme.bit=3
  quantize a network of mmcls       configs/ptq, configs/qat"""


if __name__ == '__main__':
    sys.exit(main())
