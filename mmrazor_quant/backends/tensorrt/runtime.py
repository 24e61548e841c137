"""Running a file in TensorRT; where there is none, ONNX Runtime stands in for it.

What builds and runs engines is written after the documentation of TensorRT 10 and has never been run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmrazor_quant.backends.session import Layers
from mmrazor_quant.backends.stand_in import SessionOrStandIn
from mmrazor_quant.backends.stand_in import layers as layers_of_file

from .exporter import ENGINE

LARGEST_BATCH = 64
"""Most images in a run of an engine whose batch size may vary."""


class Session(SessionOrStandIn):
    """A file, ready to run.

    Args:
        file: path of the ONNX file.
        threads: threads of a run, where it is on CPU.
    """

    def __init__(self, file: Path, threads: int = 1) -> None:
        super().__init__(Engine, missing(), file, threads)


def missing() -> str | None:
    """Returns why TensorRT cannot run here, or None."""
    try:
        import tensorrt  # noqa: F401
    except ImportError as error:
        return f'TensorRT is not there ({error})'
    return None if torch.cuda.is_available() else 'TensorRT has no CUDA device here'


def layers(file: Path) -> Layers:
    """Counts the layers with quantized input and weight, which TensorRT has to run in integers, and the others.

    Args:
        file: path of the ONNX file.
    """
    return layers_of_file(file)


class Engine:
    """An engine, built from a file and kept beside it.

    Args:
        file: path of the ONNX file.

    Raises:
        RuntimeError: TensorRT cannot read the file or make an engine of it.
    """

    def __init__(self, file: Path) -> None:
        import tensorrt as trt

        logger = trt.Logger(trt.Logger.WARNING)
        # The types of the file are followed: what has no pair around it stays float32.
        builder = trt.Builder(logger)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        _parse(trt.OnnxParser(network, logger), file)
        images = network.get_input(0)
        self.shape = tuple(None if size == -1 else int(size) for size in images.shape)
        self._trt, self._runtime, self._builder, self._network = trt, trt.Runtime(logger), builder, network
        self._input, self._file = images.name, file
        # Of an engine and its context, by size of the images: an engine is built for those that come.
        self._built: dict[tuple[int, ...], tuple[Any, Any]] = {}

    def __call__(self, images: np.ndarray) -> list[np.ndarray]:
        """Runs a batch that fits :attr:`shape`; returns the outputs."""
        size = images.shape[1:]
        if size not in self._built:
            self._built[size] = self._build(size)
        most = self.shape[0] or LARGEST_BATCH
        pieces = [self._run(images[i : i + most], *self._built[size]) for i in range(0, len(images), most)]
        return [np.concatenate(parts) for parts in zip(*pieces)]

    def _build(self, size: tuple[int, ...]) -> tuple[Any, Any]:
        config = self._builder.create_builder_config()
        if None in self.shape:
            profile = self._builder.create_optimization_profile()
            least, most = (1, LARGEST_BATCH) if self.shape[0] is None else (self.shape[0],) * 2
            profile.set_shape(self._input, (least, *size), (most, *size), (most, *size))
            config.add_optimization_profile(profile)
        plan = self._builder.build_serialized_network(self._network, config)
        if plan is None:
            raise RuntimeError(f'{self._file}: TensorRT cannot build an engine of it; its log says why')
        (self._file.parent / ENGINE).write_bytes(plan)
        engine = self._runtime.deserialize_cuda_engine(plan)
        return engine, engine.create_execution_context()

    def _run(self, images: np.ndarray, engine: Any, context: Any) -> list[np.ndarray]:
        tensors = {self._input: torch.from_numpy(np.ascontiguousarray(images)).cuda()}
        context.set_input_shape(self._input, tuple(images.shape))
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        outputs = [name for name in names if name != self._input]
        for name in outputs:
            tensors[name] = torch.empty(tuple(context.get_tensor_shape(name)), device='cuda')
        for name, tensor in tensors.items():
            context.set_tensor_address(name, tensor.data_ptr())
        stream = torch.cuda.current_stream()
        if not context.execute_async_v3(stream.cuda_stream):
            raise RuntimeError(f'{self._file}: TensorRT failed to run it; its log says why')
        stream.synchronize()
        return [tensors[name].cpu().numpy() for name in outputs]


def _parse(parser: Any, file: Path) -> None:
    if not parser.parse(file.read_bytes()):
        errors = '\n'.join(str(parser.get_error(i)) for i in range(parser.num_errors))
        raise RuntimeError(f'{file}: TensorRT cannot read it:\n{errors}')
