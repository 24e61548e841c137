"""Running a file in OpenVINO on CPU."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import openvino

from mmrazor_quant.backends.session import Layers

LAYERS = ('Convolution', 'GroupConvolution', 'Deconvolution', 'FullyConnected', 'MatMul')
INTEGERS = ('u8', 'i8')

_OPTIONS = {'INFERENCE_PRECISION_HINT': 'f32'}
"""What stays float runs in float32: on some machines OpenVINO takes bfloat16 by itself."""


class Session:
    """A file, ready to run.

    Args:
        file: path of the ONNX file.
        threads: threads of a run.
    """

    def __init__(self, file: Path, threads: int = 1) -> None:
        self._network = _compile(file, threads)
        shape = self._network.input(0).partial_shape
        self.shape = tuple(d.get_length() if d.is_static else None for d in shape)

    def __call__(self, images: np.ndarray) -> list[np.ndarray]:
        """Runs a batch that fits :attr:`shape`; returns the outputs."""
        results = self._network(images)
        return [np.array(results[i]) for i in range(len(self._network.outputs))]


def _compile(file: Path, threads: int) -> openvino.CompiledModel:
    core = openvino.Core()
    return core.compile_model(core.read_model(file), 'CPU', {**_OPTIONS, 'INFERENCE_NUM_THREADS': threads})


def layers(file: Path) -> Layers:
    """Counts the layers that run in integers and in float, in the graph that OpenVINO executes.

    Args:
        file: path of the ONNX file.
    """
    counts: dict[bool, Counter[str]] = {True: Counter(), False: Counter()}
    for operation in _compile(file, 1).get_runtime_model().get_ordered_ops():
        info = operation.get_rt_info()
        kind = str(_value(info['layerType']))
        if kind in LAYERS:
            counts[str(_value(info['runtimePrecision'])) in INTEGERS][kind] += 1
    return Layers(dict(counts[True]), dict(counts[False]))


def _value(info: object) -> object:
    return getattr(info, 'value', info)
