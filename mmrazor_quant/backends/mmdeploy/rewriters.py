"""What has to be different while mmdeploy exports, said in mmdeploy's own way: by a function rewriter."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from mmdeploy.core import FUNCTION_REWRITER


@FUNCTION_REWRITER.register_rewriter('torch.onnx.export')
def export_by_tracing(*args: Any, **kwargs: Any) -> Any:
    """Exports with the exporter that mmdeploy was written for, and that custom operations describe themselves to.

    From torch 2.9 on, another one is the default; mmdeploy 1.3.1 does not say which it wants.

    Args:
        *args: those of ``torch.onnx.export``.
        **kwargs: the same by name.
    """
    ctx = FUNCTION_REWRITER.get_context()
    kwargs = {**dict(dynamo=False, autograd_inlining=False), **kwargs}
    with warnings.catch_warnings():
        # Python numbers become constants of the file, where mmdeploy does not keep them dynamic.
        warnings.simplefilter('ignore', torch.jit.TracerWarning)
        warnings.simplefilter('ignore', DeprecationWarning)
        warnings.filterwarnings('ignore', category=UserWarning, module='torch')
        return ctx.origin_func(*args, **kwargs)
