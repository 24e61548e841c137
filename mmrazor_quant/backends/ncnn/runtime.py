"""Running files in ncnn on CPU."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import ncnn
import numpy as np

from mmrazor_quant.backends.session import Layers

from .layer_types import CONVOLUTIONS, INT8_SCALE_TERM, LINEAR
from .param_file import Layer, read_param

LAYERS = (*CONVOLUTIONS, LINEAR, 'MatMul')

_OPTIONS = ('use_fp16_packed', 'use_fp16_storage', 'use_fp16_arithmetic', 'use_bf16_packed', 'use_bf16_storage')
"""Switched off: what stays float runs in float32."""


class Session:
    """A network, ready to run, one image at a time.

    Args:
        file: path of the ``.param`` file, with the ``.bin`` file beside it.
        threads: threads of a run.

    Raises:
        ValueError: ncnn does not take the files.
    """

    def __init__(self, file: Path, threads: int = 1) -> None:
        layers = read_param(file)
        self.shape = (1, *_shape(layers))
        written = {blob for layer in layers for blob in layer.outputs}
        read = {blob for layer in layers for blob in layer.inputs}
        (self._input,) = (layer.outputs[0] for layer in layers if layer.kind == 'Input')
        self._outputs = sorted(written - read, key=lambda name: int(name.removeprefix('out')))
        self._net = ncnn.Net()
        for option in _OPTIONS:
            setattr(self._net.opt, option, False)
        self._net.opt.num_threads = threads
        weights = Path(file).with_suffix('.bin')
        if self._net.load_param(str(file)) != 0 or self._net.load_model(str(weights)) != 0:
            raise ValueError(f'ncnn cannot read {file} with {weights.name}')

    def __call__(self, images: np.ndarray) -> list[np.ndarray]:
        """Runs an image that fits :attr:`shape`; returns the outputs."""
        extractor = self._net.create_extractor()
        # A name of its own keeps the array alive until ncnn has copied it, each channel to an aligned address.
        image = np.ascontiguousarray(images[0])
        extractor.input(self._input, ncnn.Mat(image).clone())
        return [self._extract(extractor, name) for name in self._outputs]

    def _extract(self, extractor: ncnn.Extractor, name: str) -> np.ndarray:
        code, output = extractor.extract(name)
        if code != 0:
            raise RuntimeError(f'ncnn failed to compute {name}, with code {code}')
        return np.array(output)[None]


def _shape(layers: list[Layer]) -> tuple[int | None, ...]:
    (given,) = (layer for layer in layers if layer.kind == 'Input')
    return tuple(given.number(key) or None for key in (2, 1, 0))


def layers(file: Path) -> Layers:
    """Counts the layers that run in integers and in float.

    Args:
        file: path of the ``.param`` file.
    """
    counts: dict[bool, Counter[str]] = {True: Counter(), False: Counter()}
    for layer in read_param(file):
        if layer.kind in LAYERS:
            counts[layer.number(INT8_SCALE_TERM) != 0][layer.kind] += 1
    return Layers(dict(counts[True]), dict(counts[False]))
