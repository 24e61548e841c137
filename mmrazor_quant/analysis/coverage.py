"""How much of a model is captured, and whether the captured model still computes the same."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from mmengine.structures import BaseDataElement
from torch import nn

from mmrazor_quant.codebases import build_examples, codebase_of, has_modes, run_mode
from mmrazor_quant.graph.layers import BATCH_NORM_TYPES
from mmrazor_quant.tracing import CustomTracer, find_islands
from mmrazor_quant.tracing.finder import Findings, equal
from mmrazor_quant.tracing.report import CaptureReport
from mmrazor_quant.tracing.state import preserved, seeded

BATCH = 2
MODES = {False: ('tensor', 'predict'), True: ('tensor', 'loss')}
"""Modes of an OpenMMLab model that are compared, by training flag."""
FEATURES = 'features'
"""What is compared where the eager model can run none of them: the features before the head."""


@dataclass
class Comparison:
    """Outputs of the captured model against the eager one.

    Args:
        equal: whether all are equal bit for bit; None where the eager model gave none.
        notes: modes that the eager model could not run, and where the captured model raised, with the exceptions.
    """

    equal: bool | None
    notes: list[str] = field(default_factory=list)


def randomize(model: nn.Module, seed: int = 0) -> None:
    """Initialises a model without downloads and moves every parameter and norm statistic off its initial value.

    Zeros and ones, which many parameters begin with, would hide a bias or a scale that the captured model lost.

    Args:
        model: changed in place.
        seed: seed of the values.
    """
    for module in model.modules():
        init_cfg = getattr(module, 'init_cfg', None)
        if isinstance(init_cfg, Mapping) and (init_cfg.get('type') == 'Pretrained' or 'checkpoint' in init_cfg):
            module.init_cfg = None
    with seeded(seed), torch.no_grad():
        if hasattr(model, 'init_weights'):
            model.init_weights()
        for parameter in model.parameters():
            parameter.add_(torch.empty_like(parameter).uniform_(-0.02, 0.02))
        for module in model.modules():
            if isinstance(module, BATCH_NORM_TYPES) and module.running_mean is not None:
                module.running_mean.uniform_(-0.1, 0.1)
                module.running_var.uniform_(0.5, 1.5)


def capture(model: nn.Module, input_shape: tuple[int, ...] | None) -> tuple[Findings, tuple[int, ...]]:
    """Captures the islands of a model and installs them.

    Args:
        model: changed in place: islands run their captured graphs.
        input_shape: shape (channels, height, width) of an image; None: found out.

    Returns:
        What was found, and the shape (batch, channels, height, width) of the example it was captured with.

    Raises:
        ValueError: the model does not run on an image of that shape.
    """
    examples = build_examples(model, input_shape)
    findings = find_islands(model, [example.run for example in examples], CustomTracer())
    for path, island in findings.islands.items():
        island.install(model.get_submodule(path))
    return findings, examples[0].shape


def coverage_fields(model: nn.Module, findings: Findings) -> dict[str, Any]:
    """Returns the counts of islands and layers, the layers outside with the reason for each, and what else stays float.

    Args:
        model: the model that was searched for islands.
        findings: what was found.
    """
    report = CaptureReport.of(model, findings)
    return {
        'captured': bool(report.islands) and not report.outside,
        'islands': len(report.islands),
        'layers_total': report.layers_total,
        'layers_inside': report.layers_inside,
        'layers_alone': len(report.layers_alone),
        'outside': [{'layer': path, 'reason': reason} for path, reason in report.outside.items()],
        'custom_ops': [{'module': path, 'operation': name} for path, name in report.custom_ops.items()],
        'training_only': report.training_only,
    }


def compare(eager: nn.Module, captured: nn.Module, shape: tuple[int, ...], training: bool) -> Comparison:
    """Runs two models on the same random images under the same seed and compares everything they return.

    Args:
        eager: the model as it is.
        captured: a model with the same weights and islands installed.
        shape: shape (batch, channels, height, width) of the images.
        training: run in training mode, with batch norms frozen; else in eval mode.
    """
    found, notes = [], []
    where = f'{"training" if training else "evaluating"} on {shape}'
    for mode in (*MODES[training], FEATURES):
        if mode == FEATURES and (found or not hasattr(eager, 'extract_feat')):
            break
        expected = _run(eager, shape, training, mode)
        if isinstance(expected, Exception):
            notes.append(f'the float model cannot run mode {mode} ({_name(expected)})')
            continue
        actual = _run(captured, shape, training, mode)
        if isinstance(actual, Exception):
            notes.append(f'the captured model fails in mode {mode}, {where} ({_name(actual)})')
        found.append(not isinstance(actual, Exception) and equal(expected, actual))
    return Comparison(all(found) if found else None, notes)


def eager_copy(model: nn.Module) -> nn.Module:
    """Returns a copy that keeps the class's own forward everywhere; to be made before capturing."""
    return copy.deepcopy(model)


def _run(model: nn.Module, shape: tuple[int, ...], training: bool, mode: str) -> Any:
    """Returns the outputs as nested tensors, or the exception that came instead."""
    try:
        with preserved(model), torch.no_grad(), codebase_of(model).settings(model), seeded():
            model.train(training)
            for module in model.modules():
                if isinstance(module, BATCH_NORM_TYPES):
                    module.eval()
            if mode == FEATURES:
                return _plain(model.extract_feat(torch.randn(shape)))
            outputs = [run_mode(model, shape, mode)]
            if has_modes(model) and codebase_of(model).padded_samples(model, shape) is not None:
                outputs.append(run_mode(model, shape, mode, padded=True))
            return _plain(outputs)
    except Exception as error:  # whatever the model's code raises is what is asked for
        return error


def _plain(output: Any) -> Any:
    """Opens OpenMMLab's data elements, boxes and masks, which compare by identity."""
    if isinstance(output, BaseDataElement):
        return _plain(dict(output.all_items()))
    if isinstance(output, Mapping):
        return {key: _plain(value) for key, value in output.items()}
    if isinstance(output, (list, tuple)):
        return [_plain(value) for value in output]
    if isinstance(output, np.ndarray):
        return output.tolist()
    # Boxes and masks of mmdet are objects around a tensor or an array.
    inner = getattr(output, 'tensor', getattr(output, 'masks', None))
    return output if inner is None else _plain(inner)


def _name(error: Exception) -> str:
    text = str(error).strip()
    return f'{type(error).__name__}: {text}' if text else type(error).__name__
