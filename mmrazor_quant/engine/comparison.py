"""A table of float and quantized metrics."""

from __future__ import annotations

from numbers import Number

from mmrazor_quant.engine.table import aligned


def comparison_table(
    float_metrics: dict[str, float],
    quantized_metrics: dict[str, float],
    more: dict[str, dict[str, float]] | None = None,
) -> str:
    """Lay out the metrics of two or more models side by side.

    Args:
        float_metrics: Metrics of the float model.
        quantized_metrics: Metrics of the quantized model; those it lacks are left out.
        more: Metrics of further models, by the heading of their column.

    Returns:
        Lines of text: metric, float, quantized, difference between these, further columns.
    """
    more = more or {}
    rows = [('metric', 'float', 'quantized', 'difference', *more)]
    for name, before in float_metrics.items():
        after = quantized_metrics.get(name)
        if isinstance(before, Number) and isinstance(after, Number):
            others = [f'{metrics[name]:.4f}' if name in metrics else '' for metrics in more.values()]
            rows.append((name, f'{before:.4f}', f'{after:.4f}', f'{after - before:+.4f}', *others))
    return aligned(rows)
