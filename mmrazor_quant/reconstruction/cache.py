"""Activations kept between units: in memory up to a budget, in files beyond it."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor


class ActivationCache:
    """Makes room for activations, and counts it.

    Args:
        budget: Bytes to keep in memory at most; None: all of it.
        folder: Where files of what is beyond the budget are made.

    Attributes:
        in_memory: Bytes in memory now.
        peak: The most bytes that were in memory.
        spilled: Bytes that went to files, all in all.
    """

    def __init__(self, budget: int | None, folder: str | Path) -> None:
        self.budget, self.folder = budget, Path(folder)
        self.in_memory = self.peak = self.spilled = 0
        self._files: dict[int, Path] = {}
        self._made = 0

    def new(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Make an uninitialised tensor.

        Args:
            shape: Its shape.
            dtype: Its type.
            device: Its device while it is in memory; files are the CPU's.

        Returns:
            A tensor in memory, or one whose data are a file's.
        """
        size = math.prod(shape) * dtype.itemsize
        if size == 0 or self.budget is None or self.in_memory + size <= self.budget:
            self.in_memory += size
            self.peak = max(self.peak, self.in_memory)
            return torch.empty(shape, dtype=dtype, device=device)
        return self._file(shape, dtype, size)

    def _file(self, shape: tuple[int, ...], dtype: torch.dtype, size: int) -> Tensor:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f'activations_{self._made}.bin'
        self._made += 1
        path.unlink(missing_ok=True)
        tensor = torch.from_file(str(path), shared=True, size=math.prod(shape), dtype=dtype).reshape(shape)
        self.spilled += size
        self._files[tensor.data_ptr()] = path
        return tensor

    @torch.no_grad()
    def copy(self, tensor: Tensor) -> Tensor:
        """Copy a tensor into the cache."""
        return self.new(tuple(tensor.shape), tensor.dtype, tensor.device).copy_(tensor)

    def free(self, tensor: Tensor) -> None:
        """Give back the room of a tensor, which must not be used any more.

        Args:
            tensor: What :meth:`new` returned.
        """
        path = self._files.pop(tensor.data_ptr(), None) if tensor.numel() else None
        if path is None:
            self.in_memory -= tensor.numel() * tensor.element_size()
        else:
            path.unlink(missing_ok=True)  # the data live as long as they are mapped

    def close(self) -> None:
        """Remove what files are left."""
        for path in self._files.values():
            path.unlink(missing_ok=True)
        self._files.clear()
        if self.folder.is_dir() and not any(self.folder.iterdir()):
            self.folder.rmdir()
