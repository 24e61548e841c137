"""The file for dynamic quantization in ONNX Runtime: ConvInteger and MatMulInteger behind DynamicQuantizeLinear."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import onnx
from onnx import NodeProto, helper, numpy_helper

from mmrazor_quant.backends.intermediate import DOMAIN, DYNAMIC_FAKE_QUANT, Intermediate
from mmrazor_quant.backends.qdq import Writer, remove_unused, resolve_constants

FILE = 'model.onnx'
INTEGER = {'Conv': 'ConvInteger', 'Gemm': 'MatMulInteger', 'MatMul': 'MatMulInteger'}


def write(network: Intermediate, folder: Path) -> Path:
    """Writes the file.

    Args:
        network: intermediate form.
        folder: where to; it exists.

    Returns:
        Path of the file.

    Raises:
        ValueError: a quantized layer that ONNX Runtime does not run in integers.
    """
    onnx.save(to_dynamic(network), folder / FILE)
    return folder / FILE


def to_dynamic(network: Intermediate) -> onnx.ModelProto:
    """Writes a network with standard operations only.

    Args:
        network: the intermediate form, of dynamic quantizers; left as it is.

    Raises:
        ValueError: a quantized layer that ONNX Runtime does not run in integers.
    """
    model = copy.deepcopy(network.onnx)
    resolve_constants(model.graph)
    writer = _DynamicWriter(model.graph, network)
    nodes = [made for node in model.graph.node for made in writer.nodes(node)]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    del model.opset_import[:]
    model.opset_import.extend(o for o in network.onnx.opset_import if o.domain != DOMAIN)
    remove_unused(model.graph)
    onnx.checker.check_model(model, full_check=True)
    return model


class _DynamicWriter(Writer):
    """Replaces quantizers and the layers that read them.

    Args:
        graph: what is written to.
        network: the grids of the weights.
    """

    def __init__(self, graph: onnx.GraphProto, network: Intermediate) -> None:
        super().__init__(graph)
        self.grids = network.weights
        self.transposed = {n.output[0]: n.input[0] for n in graph.node if n.op_type == 'Transpose'}
        self.quantized: dict[str, list[str]] = {}

    def nodes(self, node: NodeProto) -> list[NodeProto]:
        """Makes what a node of the intermediate form becomes."""
        if node.domain == DOMAIN and node.op_type == DYNAMIC_FAKE_QUANT:
            name = node.output[0]
            self.quantized[name] = [f'{name}.{part}' for part in ('integers', 'scale', 'zero_point')]
            return [helper.make_node('DynamicQuantizeLinear', node.input[:1], self.quantized[name], f'{name}.quantize')]
        if not any(name in self.quantized for name in node.input):
            return [node]
        if node.op_type not in INTEGER or node.input[0] not in self.quantized or self._weight(node) is None:
            raise ValueError(
                f'export: {node.op_type} ({node.name}) has a dynamically quantized input, which onnxruntime_dynamic '
                f'runs for {", ".join(INTEGER)} with quantized weights only; allowed in qconfig.overrides for the '
                "layer: w_qscheme='float' with a_qscheme='float'"
            )
        return self._layer(node)

    def _weight(self, node: NodeProto) -> str | None:
        name = self.transposed.get(node.input[1], node.input[1])
        return name if name in self.grids else None

    def _layer(self, node: NodeProto) -> list[NodeProto]:
        """Makes the sums of integers, and the float result: sums * (scale_input * scale_weight) + bias."""
        source, scale, zero_point = self.quantized[node.input[0]]
        weight, weight_scale, weight_zero = self._integer_weight(node, self._weight(node))
        output, is_conv = node.output[0], node.op_type == 'Conv'
        sums, real, factor = (f'{output}.{part}' for part in ('sums', 'float', 'factor'))
        nodes = [
            helper.make_node(
                INTEGER[node.op_type], [source, weight, zero_point, weight_zero], [sums], f'{output}.layer'
            ),
            helper.make_node('Cast', [sums], [real], f'{output}.cast', to=onnx.TensorProto.FLOAT),
            helper.make_node('Mul', [scale, weight_scale], [factor], f'{output}.scales'),
        ]
        if is_conv:
            nodes[0].attribute.extend(node.attribute)
        bias = node.input[2] if len(node.input) > 2 else ''
        scaled = f'{output}.scaled' if bias else output
        nodes.append(helper.make_node('Mul', [real, factor], [scaled], f'{output}.scale'))
        if bias:
            added = self._per_output(node, numpy_helper.to_array(self.values[bias])) if bias in self.values else None
            if added is None and is_conv:
                raise ValueError(f'export: {node.op_type} ({node.name}) has a computed bias, allowed: a parameter')
            name = bias if added is None else self.store(f'{output}.bias', added)
            nodes.append(helper.make_node('Add', [scaled, name], [output], f'{output}.add'))
        return nodes

    def _per_output(self, node: NodeProto, values: np.ndarray) -> np.ndarray:
        """Gives values per output channel the shape that fits a layer's results."""
        dims = len(self.values[self._weight(node)].dims) - 2
        return values.reshape(-1, *[1] * dims) if node.op_type == 'Conv' else values

    def _integer_weight(self, node: NodeProto, name: str) -> tuple[str, str, str]:
        """Stores integers, scale and zero point of a weight in the form that a layer takes; returns their names."""
        grid = self.grids[name]
        integers = grid.integers(numpy_helper.to_array(self.values[name])).astype(np.int8)
        scale = self._per_output(node, grid.scale)
        if node.op_type == 'Gemm' or node.input[1] in self.transposed:
            integers = np.ascontiguousarray(integers.T)
        stored = f'{node.output[0]}.weight'
        return (
            self.store(stored, integers),
            self.store(f'{stored}.scale', scale.reshape(()) if grid.ch_axis == -1 else scale),
            self.store(f'{stored}.zero_point', np.array(0, np.int8)),
        )
