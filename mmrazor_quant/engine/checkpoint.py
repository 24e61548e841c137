"""Checkpoint files: written whole or not at all, checked before any work, found again after a kill."""

from __future__ import annotations

import io
import os
import pickle
import time
from pathlib import Path

import mmengine
import torch
from mmengine.dist import is_main_process
from mmengine.fileio import LocalBackend, register_backend
from mmengine.hooks import CheckpointHook
from mmengine.runner import Runner
from mmengine.runner.checkpoint import weights_to_cpu

from mmrazor_quant.engine.quant_model import QuantModel
from mmrazor_quant.version import __version__

ATOMIC_BACKEND = 'mmrazor_atomic'
"""Name of :class:`AtomicLocalBackend` in mmengine's ``backend_args``."""


class AtomicLocalBackend(LocalBackend):
    """Local files that are never half written, whenever the process is killed.

    Args:
        pending: Files to remove once the next file is complete. Hand the same list to all backends of one run:
            mmengine's CheckpointHook removes the last checkpoint that it keeps *before* it writes the next.
    """

    def __init__(self, pending: list[str] | None = None) -> None:
        self._pending = pending

    def put(self, obj: bytes, filepath: str | Path) -> None:
        """Write a file beside its destination, then rename it.

        Args:
            obj: Contents.
            filepath: Destination.
        """
        target = Path(filepath)
        target.parent.mkdir(parents=True, exist_ok=True)
        # One name per destination: what a killed run leaves behind is overwritten by the next, not added to.
        partial = target.with_name(f'.{target.name}.partial')
        with open(partial, 'wb') as file:
            file.write(obj)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, target)
        self._remove_pending(str(filepath))

    def remove(self, filepath: str | Path) -> None:
        """Remove a file, after the next one is complete where there is a ``pending`` list.

        Args:
            filepath: File to remove.
        """
        if self._pending is None:
            super().remove(filepath)
        else:
            self._pending.append(str(filepath))

    def _remove_pending(self, written: str) -> None:
        """Remove what was waiting for the file just written, unless it is that file."""
        while self._pending:
            path = self._pending.pop()
            if path != written and os.path.isfile(path):
                os.remove(path)


register_backend(ATOMIC_BACKEND, AtomicLocalBackend, force=True)


def make_checkpoints_atomic(runner: Runner) -> None:
    """Have the checkpoint hooks of a runner write whole files, where they write to a local disk.

    Args:
        runner: Runner whose training has not begun.
    """
    for hook in runner.hooks:
        is_local = '://' not in str(getattr(hook, 'out_dir', None))
        if isinstance(hook, CheckpointHook) and is_local and not hook.backend_args and not hook.file_client_args:
            hook.backend_args = {'backend': ATOMIC_BACKEND, 'pending': []}


def load_checkpoint_file(path: str | Path, field: str) -> dict:
    """Open a checkpoint file; tensors are mapped, not read.

    Args:
        path: Local file.
        field: Argument or config field that names it, for the error.

    Returns:
        The checkpoint.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is truncated or not a checkpoint.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f'{field}: there is no file {path}')
    try:
        checkpoint = _torch_load(path)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f'{field}: {path} is not a checkpoint, or holds objects that are not safe to load: '
            f'{str(error).splitlines()[0]}'
        ) from error
    except Exception as error:
        # Anything can happen on the way through a damaged file.
        detail = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f'{field}: {path} cannot be read; it is truncated or not a checkpoint ({detail})') from error
    if not isinstance(checkpoint, dict):
        raise ValueError(f'{field}: {path} holds a {type(checkpoint).__name__}, not a checkpoint')
    return checkpoint


def _torch_load(path: Path) -> dict:
    """Load with memory mapping, which only torch's zip format (the default since 1.6) offers."""
    with open(path, 'rb') as file:
        is_zip = file.read(4) == b'PK\x03\x04'
    return torch.load(path, map_location='cpu', weights_only=True, mmap=is_zip)


def check_checkpoint(path: str | None, field: str) -> None:
    """Fail early and readably on a checkpoint that is missing or damaged; addresses other than files are not checked.

    Args:
        path: Value of the field; None is fine.
        field: Argument or config field.
    """
    if path is not None and '://' not in path:
        load_checkpoint_file(path, field)


def check_checkpoint_matches(checkpoint: dict, model: torch.nn.Module) -> None:
    """Refuse a checkpoint of another network: mmengine only warns and goes on with random weights.

    Args:
        checkpoint: Loaded checkpoint.
        model: Model that it is for.

    Raises:
        ValueError: If no parameter or buffer of the model is in the checkpoint with its shape.
    """
    state = checkpoint.get('state_dict', checkpoint)
    own = {key: value.shape for key, value in model.state_dict().items()}
    names = {key.removeprefix('module.'): getattr(value, 'shape', None) for key, value in state.items()}
    if not any(own.get(key) == shape for key, shape in names.items()):
        raise ValueError(
            f'the checkpoint does not belong to this model: none of its {len(names)} entries '
            f"(the first is {next(iter(names), None)!r}) matches one of the model's {len(own)} "
            f'(the first is {next(iter(own), None)!r}) in name and shape'
        )


def find_resumable_checkpoint(work_dir: str | Path) -> str | None:
    """Find the checkpoint to resume from in a work directory whose run may have been killed at any moment.

    That is the one mmengine noted last or, where the note or that file is damaged or gone, the newest complete one.

    Args:
        work_dir: Work directory of the run.

    Returns:
        Path of the checkpoint, or None: start from the beginning.
    """
    work_dir = Path(work_dir)
    note = work_dir / 'last_checkpoint'
    noted = Path(note.read_text().strip()) if note.is_file() else None
    folders = {work_dir} | ({noted.parent} if noted and noted.name else set())
    others = (path for folder in folders for path in folder.glob('*.pth'))
    candidates = sorted(others, key=lambda path: path.stat().st_mtime, reverse=True)
    if noted and noted.name:
        candidates.insert(0, noted)
    return next((str(path) for path in candidates if _is_resumable(path)), None)


def _is_resumable(path: Path) -> bool:
    """Tell whether a file is a complete checkpoint with the state of training in it."""
    try:
        checkpoint = load_checkpoint_file(path, 'resume')
    except (FileNotFoundError, ValueError):
        return False
    return {'state_dict', 'optimizer', 'message_hub', 'meta'} <= set(checkpoint)


def save_quantized_checkpoint(runner: Runner, model: QuantModel, path: str, dataset_meta: dict | None) -> None:
    """Save a calibrated model as mmengine saves checkpoints; only the main process writes.

    ``Runner.save_checkpoint`` needs a training loop, and calls ``before_save_checkpoint`` of hooks such as EMAHook,
    which would put the weights of a copy made before calibration in place of the model's.

    Args:
        runner: Runner of the model.
        model: The model, without data-parallel wrapper.
        path: Destination.
        dataset_meta: Meta information of the dataset, such as its classes.
    """
    if not is_main_process():
        return
    meta = {
        'cfg': runner.cfg.pretty_text,
        'seed': runner.seed,
        'experiment_name': runner.experiment_name,
        'time': time.strftime('%Y%m%d_%H%M%S'),
        'mmengine_version': mmengine.__version__,
        'mmrazor_quant_version': __version__,
    }
    if dataset_meta is not None:
        meta['dataset_meta'] = dataset_meta
    checkpoint = {'meta': meta, 'state_dict': weights_to_cpu(model.state_dict())}
    # Not by mmengine's save_checkpoint, which warns at each call of a class of its own.
    with io.BytesIO() as buffer:
        torch.save(checkpoint, buffer)
        AtomicLocalBackend().put(buffer.getvalue(), path)
