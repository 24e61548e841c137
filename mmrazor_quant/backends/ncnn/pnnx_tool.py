"""Running pnnx, which turns TorchScript into ncnn's files."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

import pnnx
import torch


def run_pnnx(
    script: torch.jit.ScriptModule, shapes: Sequence[Sequence[int]], kept: Sequence[str], folder: Path
) -> tuple[Path, Path]:
    """Converts a traced network to float32 files of ncnn.

    Args:
        script: the network.
        shapes: shapes of the input: one, or two of which the differing sizes are to vary.
        kept: types of modules that become one layer each.
        folder: where to; it exists.

    Returns:
        Paths of the ``.param`` and the ``.bin`` file.

    Raises:
        RuntimeError: pnnx failed.
    """
    names = {'ncnnparam': 'float.param', 'ncnnbin': 'float.bin'}
    unused = {key: f'unused.{key}' for key in ('pnnxparam', 'pnnxbin', 'pnnxpy', 'pnnxonnx', 'ncnnpy')}
    script.save(str(folder / 'network.pt'))
    options = {'fp16': 0, 'moduleop': ','.join(kept), **names, **unused}
    options.update({key: _listed(shape) for key, shape in zip(('inputshape', 'inputshape2'), shapes)})
    command = [pnnx.EXEC_PATH, 'network.pt', *(f'{key}={value}' for key, value in options.items() if value != '')]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors='replace')
    files = tuple(folder / name for name in names.values())
    if done.returncode != 0 or not all(file.is_file() for file in files):
        raise RuntimeError(f'pnnx failed with code {done.returncode}:\n{(done.stdout + done.stderr)[-2000:]}')
    return files


def _listed(shape: Sequence[int]) -> str:
    return f'[{",".join(map(str, shape))}]'
