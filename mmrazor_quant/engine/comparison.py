"""A table of float and quantized metrics."""

from __future__ import annotations

from numbers import Number

from mmrazor_quant.engine.table import aligned


def comparison_table(float_metrics: dict[str, float], quantized_metrics: dict[str, float]) -> str:
    """Lay out the metrics of two models side by side.

    Args:
        float_metrics: Metrics of the float model.
        quantized_metrics: Metrics of the quantized model; those it lacks are left out.

    Returns:
        Lines of text: metric, float, quantized, difference.
    """
    rows = [('metric', 'float', 'quantized', 'difference')]
    for name, before in float_metrics.items():
        after = quantized_metrics.get(name)
        if isinstance(before, Number) and isinstance(after, Number):
            rows.append((name, f'{before:.4f}', f'{after:.4f}', f'{after - before:+.4f}'))
    return aligned(rows)
