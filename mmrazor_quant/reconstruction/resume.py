"""Files of finished units, from which a killed reconstruction goes on."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import all_gather_object, barrier, broadcast_object_list, is_main_process
from torch import Tensor

from mmrazor_quant.engine.checkpoint import AtomicLocalBackend, load_checkpoint_file

from .progress import UnitReport


def fingerprint(*parts: Any) -> str:
    """Hash what a reconstruction depends on.

    Args:
        *parts: Tensors, lists of parts, and anything else with a ``repr`` that says all of it.

    Returns:
        Hexadecimal digits.
    """
    digest = hashlib.sha256()
    for part in _flat(parts):
        if isinstance(part, Tensor):
            digest.update(f'{tuple(part.shape)}{part.dtype}'.encode())
            digest.update(part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        else:
            digest.update(repr(part).encode())
    return digest.hexdigest()


def _flat(parts: Iterable[Any]) -> Iterable[Any]:
    for part in parts:
        if isinstance(part, (list, tuple)):
            yield from _flat(part)
        else:
            yield part


class FinishedUnits:
    """The finished units of one reconstruction, a file each.

    Args:
        folder: Where the files are.
        mark: Fingerprint of this process; files of another one are ignored, and overwritten.
    """

    def __init__(self, folder: str | Path, mark: str) -> None:
        # Other ranks have other data, and only the first one writes: the mark is that of all.
        self.folder, self.mark = Path(folder), fingerprint(self._of_all_ranks(mark))
        self.count = self._agreed(self._count_files() if is_main_process() else 0)

    def _path(self, index: int) -> Path:
        return self.folder / f'unit_{index:04d}.pth'

    def _count_files(self) -> int:
        index = 0
        while self._load(index) is not None:
            index += 1
        return index

    @staticmethod
    def _of_all_ranks(mark: str) -> list[str]:
        return all_gather_object(mark)

    @staticmethod
    def _agreed(count: int) -> int:
        counts = [count]
        broadcast_object_list(counts)
        return counts[0]

    def _load(self, index: int) -> dict[str, Any] | None:
        try:
            found = load_checkpoint_file(self._path(index), 'reconstruction')
        except (FileNotFoundError, ValueError):
            return None
        return found if found.get('mark') == self.mark else None

    def load(self, index: int) -> tuple[dict[str, Any], UnitReport]:
        """Give the states of a unit's quantizers by path, and its report."""
        found = self._load(index)
        if found is None:
            raise RuntimeError(f'reconstruction: {self._path(index)} has gone')
        return found['states'], UnitReport(**found['report'])

    def save(self, index: int, states: dict[str, Any], report: UnitReport) -> None:
        """Keep a unit; only the main process writes."""
        if not is_main_process():
            return
        with io.BytesIO() as buffer:
            torch.save({'mark': self.mark, 'states': states, 'report': asdict(report)}, buffer)
            AtomicLocalBackend().put(buffer.getvalue(), self._path(index))

    def remove(self) -> None:
        """Remove all files, once the whole result is saved elsewhere."""
        barrier()
        if is_main_process() and self.folder.is_dir():
            for path in self.folder.glob('unit_*.pth'):
                path.unlink()
            if not any(self.folder.iterdir()):
                self.folder.rmdir()
