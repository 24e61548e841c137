"""Running a file in ONNX Runtime on CPU."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime

from mmrazor_quant.backends.session import Layers

INTEGER = (
    'QLinearConv', 'QLinearMatMul', 'QGemm', 'ConvInteger', 'MatMulInteger', 'MatMulIntegerToFloat',
    'DynamicQuantizeMatMul',
)  # fmt: skip
FLOAT = ('Conv', 'FusedConv', 'Gemm', 'FusedGemm', 'MatMul', 'FusedMatMul', 'ConvTranspose')


class Session:
    """A file, ready to run.

    Args:
        file: path of the ONNX file.
        threads: threads of a run.
        optimized: where to write the graph that is run; None: nowhere.
        fuse: whether graphs are optimized, which makes integer kernels of Q/DQ pairs; without, they run one by one.
    """

    def __init__(self, file: Path, threads: int = 1, optimized: Path | None = None, fuse: bool = True) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        # What is said about the graph being for this machine only.
        options.log_severity_level = 3
        if not fuse:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        if optimized is not None:
            options.optimized_model_filepath = str(optimized)
        self._session = onnxruntime.InferenceSession(str(file), options, providers=['CPUExecutionProvider'])
        (given,) = self._session.get_inputs()
        self.shape = tuple(d if isinstance(d, int) else None for d in given.shape)

    def __call__(self, images: np.ndarray) -> list[np.ndarray]:
        """Runs a batch that fits :attr:`shape`; returns the outputs."""
        return self._session.run(None, {'input': images})


def layers(file: Path) -> Layers:
    """Counts the layers that run in integers and in float, in the graph that ONNX Runtime makes of a file.

    Args:
        file: path of the ONNX file.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 'optimized.onnx'
        Session(file, optimized=path)
        counts = Counter(node.op_type for node in onnx.load(str(path)).graph.node)
    return Layers(
        {kind: counts[kind] for kind in INTEGER if counts[kind]}, {kind: counts[kind] for kind in FLOAT if counts[kind]}
    )
