"""Running a Q/DQ file whose backend is not there: in ONNX Runtime, operation by operation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from .onnxruntime.runtime import Session
from .qdq_graph import LAYERS, QdqGraph
from .session import Layers


class StandIn(Session):
    """A file, ready to run, with Q/DQ pairs left as they are: the numbers of the backend, not its speed.

    Args:
        file: path of the ONNX file.
        reason: why the backend does not run it.
        threads: threads of a run.
    """

    def __init__(self, file: Path, reason: str, threads: int = 1) -> None:
        super().__init__(file, threads, fuse=False)
        self.stand_in = (
            f'{reason}; what is measured is the same file in ONNX Runtime on CPU, without graph optimizations'
        )


class SessionOrStandIn:
    """A file, ready to run by its backend, or by the stand-in where that is not there.

    Args:
        run: makes what runs the file on the backend.
        reason: why the backend does not run it; None: it does.
        file: path of the ONNX file.
        threads: threads of the stand-in.
    """

    def __init__(self, run: Callable[[Path], Any], reason: str | None, file: Path, threads: int) -> None:
        self._network = run(file) if reason is None else StandIn(file, reason, threads)
        self.shape = self._network.shape
        self.stand_in = getattr(self._network, 'stand_in', None)

    def __call__(self, images: np.ndarray) -> list[np.ndarray]:
        """Runs a batch that fits :attr:`shape`; returns the outputs."""
        return self._network(images)


def layers(file: Path) -> Layers:
    """Counts the layers whose input and weight are quantized, and the others, by what a file says.

    Args:
        file: path of the ONNX file.
    """
    graph = QdqGraph(onnx.load(str(file)))
    counts: dict[bool, Counter[str]] = {True: Counter(), False: Counter()}
    for node in graph.nodes(*LAYERS):
        counts[all(graph.is_dequantized(name) for name in node.input[:2])][node.op_type] += 1
    return Layers(dict(counts[True]), dict(counts[False]))
