"""Seeing every torch function while a module is traced."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode

from .nested import leaves
from .values import node_of

if TYPE_CHECKING:
    from .tracer import CustomTracer


_GRAD_MODE = torch._C._set_grad_enabled
"""What ``torch.no_grad`` calls; public ones end here."""


class RecordingMode(TorchFunctionMode):
    """Sees every torch function and tensor method called during a trace, factories included."""

    def __init__(self, tracer: CustomTracer) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if self.tracer.evaluating or func is _GRAD_MODE:
            return func(*args, **kwargs)
        if any(node_of(leaf) is not None for leaf in leaves((args, kwargs))):
            return self.tracer.record(func, args, kwargs)
        return self.tracer.run_constant(func, args, kwargs)
