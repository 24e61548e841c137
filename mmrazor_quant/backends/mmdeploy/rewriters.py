"""What has to be different while mmdeploy exports, said in mmdeploy's own way: by a function rewriter."""

from __future__ import annotations

from typing import Any

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
    kwargs.setdefault('dynamo', False)
    kwargs.setdefault('autograd_inlining', False)
    return ctx.origin_func(*args, **kwargs)
