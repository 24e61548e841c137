"""A model of OpenMMLab whose network is a file that a backend runs."""

from __future__ import annotations

import copy
import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from mmrazor_quant.codebases import codebase_of

from .session import Session, run

REPORT = 'deploy.json'
"""What was exported, beside the file."""

DEPLOYABLE = ('onnxruntime', 'onnxruntime_dynamic', 'openvino', 'ncnn', 'snpe', 'tensorrt')
"""Backends with an exporter and a runtime here."""


def backend_module(backend: str, name: str) -> ModuleType:
    """Imports a backend's ``exporter`` or ``runtime``.

    Args:
        backend: name of the backend.
        name: name of the module.

    Raises:
        ValueError: a backend that cannot be deployed to.
        ImportError: a package that it needs is missing.
    """
    if backend not in DEPLOYABLE:
        raise ValueError(f'--backend: got {backend!r}, allowed: {", ".join(DEPLOYABLE)}')
    try:
        return importlib.import_module(f'mmrazor_quant.backends.{backend}.{name}')
    except ModuleNotFoundError as error:
        raise ImportError(
            f"--backend {backend} needs the package {error.name}: pip install 'mmrazor_quant[deployment]'"
        ) from error


def read_report(folder: Path) -> dict[str, Any]:
    """Reads ``deploy.json`` of an export.

    Args:
        folder: folder of the export.

    Returns:
        What was written there.

    Raises:
        FileNotFoundError: if there is none.
    """
    path = Path(folder) / REPORT
    if not path.is_file():
        raise FileNotFoundError(f'--model: there is no {REPORT} in {folder}; tools/export.py writes such folders')
    return json.loads(path.read_text())


def check_backend(model: nn.Module, backend: str, field: str = '--backend') -> None:
    """Refuses a model whose quantizers are not where the backend wants them.

    Args:
        model: the quantized model.
        backend: name of the backend.
        field: argument or config field that names the backend, for the message.

    Raises:
        ValueError: if it was built for another one.
    """
    rules = getattr(model.quantizer, 'rules', None)
    found = None if rules is None else rules.name
    if found != backend:
        raise ValueError(
            f'model.quantizer.backend: got {found!r}, allowed with {field} {backend}: {backend!r}; quantizers are '
            'placed as the backend runs them, so calibrate or train the model with it'
        )


def open_session(backend: str, folder: Path, threads: int = 1) -> Session:
    """Opens what was exported to a folder.

    Args:
        backend: name of the backend.
        folder: folder of the export.
        threads: threads of a run.

    Raises:
        FileNotFoundError: nothing was exported there.
        ValueError: it was exported for another backend.
    """
    runtime, exporter = (backend_module(backend, name) for name in ('runtime', 'exporter'))
    found = read_report(folder)['backend']
    if found != backend:
        raise ValueError(f'--backend: got {backend!r}, allowed with --model {folder}: {found!r}')
    file = Path(folder) / exporter.FILE
    if not file.is_file():
        raise FileNotFoundError(f'--model: there is no {exporter.FILE} in {folder}')
    return runtime.Session(file, threads)


def head_of(architecture: nn.Module) -> nn.Module:
    """Returns the part of a model whose results the exported network gives: what is behind it stays in Python.

    Args:
        architecture: the float architecture.

    Raises:
        ValueError: a model that is no backbone with one head behind it.
    """
    head = codebase_of(architecture).head(architecture)
    if head is None:
        raise ValueError(
            f'architecture: got a {type(architecture).__name__}, allowed: classifiers of mmcls and one-stage detectors '
            'of mmdet, whose network ends in one head'
        )
    return head


def raw_outputs(architecture: nn.Module, images: Tensor) -> Any:
    """Runs the network of a model: backbone, neck, and the forward of its head.

    Args:
        architecture: the architecture.
        images: preprocessed images, shape (batch, channels, height, width).
    """
    return head_of(architecture)(architecture.extract_feat(images))


class _Run:
    """The forward of a head whose network is a session's."""

    def __init__(self, session: Session, spec: pytree.TreeSpec, places: list[int], leaves: list[Any]) -> None:
        self.session, self.spec, self.places, self.leaves = session, spec, places, leaves

    def __call__(self, images: Tensor) -> Any:
        leaves = list(self.leaves)
        for place, value in zip(self.places, run(self.session, images), strict=True):
            leaves[place] = value
        return pytree.tree_unflatten(leaves, self.spec)


@torch.no_grad()
def deployed(architecture: nn.Module, session: Session, images: Tensor) -> nn.Module:
    """Returns a copy of a model whose network is run by a backend; pre- and post-processing are its own.

    Args:
        architecture: the architecture, float or quantized; left as it is.
        session: the exported network.
        images: preprocessed images, to see how the network's outputs are nested.
    """
    architecture = copy.deepcopy(architecture).eval()
    head = head_of(architecture)
    leaves, spec = pytree.tree_flatten(raw_outputs(architecture, images))
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    vars(architecture)['extract_feat'] = lambda images, *args, **kwargs: images
    vars(head)['forward'] = _Run(session, spec, places, leaves)
    return architecture
