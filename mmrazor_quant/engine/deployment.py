"""From a quantized checkpoint to a backend's file, and to the accuracy of that file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mmrazor_quant.backends.deploy import REPORT, backend_module, raw_outputs
from mmrazor_quant.backends.expected import integer_layers
from mmrazor_quant.backends.grid import QuantGrid
from mmrazor_quant.backends.intermediate import PREFIX, Intermediate, export_intermediate, tensors_of
from mmrazor_quant.backends.rules import Rules
from mmrazor_quant.backends.session import Layers, run
from mmrazor_quant.backends.simulation import arithmetic_of, simulated
from mmrazor_quant.engine.calibration import set_quantized
from mmrazor_quant.engine.quant_model import QuantModel

_PACKAGES = (
    'torch', 'onnx', 'onnxruntime', 'onnxruntime-qnn', 'openvino', 'ncnn', 'pnnx', 'tensorrt', 'mmcls', 'mmdet',
)  # fmt: skip


def export(
    model: QuantModel, images: Tensor, backend: str, folder: Path, dynamic: Sequence[int], checkpoint: str
) -> dict[str, Any]:
    """Exports a model, runs the file and compares.

    Args:
        model: calibrated model, built for the backend.
        images: preprocessed images, shape (batch, channels, height, width).
        backend: name of the backend.
        folder: where to; made if it is not there.
        dynamic: dimensions of the images that may vary.
        checkpoint: path of the checkpoint, to be noted.

    Returns:
        What is written to ``deploy.json``: tensors, versions, and the comparison.
    """
    exporter, runtime = (backend_module(backend, name) for name in ('exporter', 'runtime'))
    folder.mkdir(parents=True, exist_ok=True)
    network = export_intermediate(model, images, raw_outputs, dynamic)
    file = exporter.write(network, folder)
    files = [folder / name for name in getattr(exporter, 'FILES', (file.name,))]
    layers, session = runtime.layers(file), runtime.Session(file)
    next_steps = getattr(exporter, 'next_steps', None)
    report = {
        'backend': backend,
        'file': file.name,
        'checkpoint': str(Path(checkpoint).resolve()),
        'versions': _versions(),
        'input_shape': list(images.shape),
        'dynamic_dimensions': list(dynamic),
        'bytes': sum(path.stat().st_size for path in files),
        'float_bytes': sum(p.numel() * 4 for p in model.architecture.parameters()),
        'layers': vars(layers),
        'left_in_float': left_in_float(network, model.quantizer.rules, layers),
        'stand_in': getattr(session, 'stand_in', None),
        'agreement': compare(simulated_or_itself(model, backend), session, images),
        'next_steps': next_steps(file, images.shape, dynamic) if next_steps else [],
        'tensors': _tensors(network),
    }
    (folder / REPORT).write_text(json.dumps(report, indent=1))
    return report


def left_in_float(network: Intermediate, rules: Rules, layers: Layers) -> int:
    """Counts the layers that should run in integers by a backend's table and do not.

    Args:
        network: the network.
        rules: the backend's table.
        layers: what the backend runs.
    """
    return max(0, len(integer_layers(network, rules)) - sum(layers.integer.values()))


def simulated_or_itself(model: QuantModel, backend: str) -> nn.Module:
    """Returns the architecture, fake-quantized in the arithmetic of a backend, or as in training where that is unknown.

    Args:
        model: calibrated model, built for the backend; switched to evaluation with quantizers on.
        backend: name of the backend.
    """
    set_quantized(model)
    model.eval()
    arithmetic = arithmetic_of(backend)
    return model.architecture if arithmetic is None else simulated(model, arithmetic)


@torch.no_grad()
def compare(architecture: nn.Module, session: Any, images: Tensor) -> dict[str, float]:
    """Compares the raw outputs of a deployed network with those of the fake-quantized one.

    Args:
        architecture: the fake-quantized architecture, for evaluation.
        session: the deployed network.
        images: preprocessed images.

    Returns:
        ``max_difference``, relative to the largest value of the output that differs most; and, for a network with one
        output of shape (batch, classes), ``argmax``: the share of images with the same class.
    """
    expected = tensors_of(raw_outputs(architecture, images))
    found = run(session, images)
    worst = max(
        ((a - b).abs().max() / b.abs().max().clamp_min(1e-9)).item() for a, b in zip(found, expected, strict=True)
    )
    result = {'max_difference': worst}
    if len(expected) == 1 and expected[0].dim() == 2:
        result['argmax'] = (found[0].argmax(1) == expected[0].argmax(1)).float().mean().item()
    return result


def describe(report: dict[str, Any]) -> str:
    """Lays out a report for people.

    Args:
        report: what :func:`export` returned.

    Returns:
        Lines of text.
    """
    agreement = report['agreement']
    share = report['bytes'] / report['float_bytes']
    lines = [
        f'{report["file"]}: {report["bytes"]} bytes, {share:.3f} of the float weights',
        f'layers {Layers(**report["layers"])}; {report["left_in_float"]} in float that should be in integers',
        f'largest difference to the fake-quantized model: {agreement["max_difference"]:.4f} of the largest value',
    ]
    if 'argmax' in agreement:
        lines.append(f'same class: {100 * agreement["argmax"]:.2f} % of {report["input_shape"][0]} images')
    if report['stand_in']:
        lines.append(f'not run by {report["backend"]}: {report["stand_in"]}')
    return '\n'.join([*lines, *report['next_steps']])


def _tensors(network: Intermediate) -> dict[str, dict[str, Any]]:
    weights = {name.removeprefix(PREFIX): grid for name, grid in network.weights.items()}
    everything = {**weights, **network.activations}
    return {name: _numbers(grid) for name, grid in everything.items()}


def _numbers(grid: QuantGrid) -> dict[str, Any]:
    return {
        'bits': int(grid.quant_max - grid.quant_min).bit_length(),
        'quant_min': grid.quant_min,
        'quant_max': grid.quant_max,
        'axis': grid.ch_axis,
        'scale': np.asarray(grid.scale, dtype=np.float64).tolist(),
        'zero_point': grid.zero_point.tolist(),
    }


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
