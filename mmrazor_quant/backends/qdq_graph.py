"""Reading files with Q/DQ pairs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, numpy_helper

Q, DQ = 'QuantizeLinear', 'DequantizeLinear'
LAYERS = ('Conv', 'ConvTranspose', 'Gemm', 'MatMul')
"""Operations with a weight or a second tensor in place of one."""

MOVING = (
    'Transpose', 'Reshape', 'Flatten', 'Squeeze', 'Unsqueeze', 'Identity', 'Slice', 'Split', 'Gather', 'Expand', 'Pad',
    'MaxPool', 'DepthToSpace', 'SpaceToDepth',
)  # fmt: skip
"""Operations that give values of their first input, whose grid is that of the result, too."""


class QdqGraph:
    """Who makes and who reads each tensor of a file.

    Args:
        model: the file; left as it is.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self.constants: dict[str, TensorProto] = {i.name: i for i in model.graph.initializer}
        self.producers: dict[str, NodeProto] = {}
        self.readers: dict[str, list[NodeProto]] = defaultdict(list)
        self.outputs = {output.name for output in model.graph.output}
        for node in model.graph.node:
            self.producers.update(dict.fromkeys(node.output, node))
            for name in node.input:
                self.readers[name].append(node)
            if node.op_type == 'Constant' and node.attribute[0].name == 'value':
                self.constants[node.output[0]] = node.attribute[0].t

    def nodes(self, *kinds: str) -> Iterator[NodeProto]:
        """Yields the nodes of these kinds."""
        return (node for node in self.model.graph.node if node.op_type in kinds)

    def values(self, name: str) -> np.ndarray | None:
        """Returns the values of a constant as float32; None for other tensors."""
        tensor = self.constants.get(name)
        return None if tensor is None else np.asarray(numpy_helper.to_array(tensor)).astype(np.float32)

    def scale_and_zero_point(self, node: NodeProto) -> tuple[np.ndarray | None, np.ndarray | None]:
        """Returns those of a node of a pair, as float32; None where they are no constants, or not given."""
        scale, zero_point = [*node.input, ''][1:3]
        return self.values(scale), self.values(zero_point)

    def integer_type(self, node: NodeProto) -> int:
        """Returns the type (of ``TensorProto``) of the integers that a node of a pair writes or reads."""
        if node.op_type == DQ and node.input[0] in self.constants:
            return self.constants[node.input[0]].data_type
        if node.op_type == DQ and self.made_by(node.input[0], Q) is not None:
            return self.integer_type(self.producers[node.input[0]])
        if len(node.input) > 2 and node.input[2] in self.constants:
            return self.constants[node.input[2]].data_type
        return next((a.i for a in node.attribute if a.name == 'output_dtype'), TensorProto.UINT8)

    def made_by(self, name: str, *kinds: str) -> NodeProto | None:
        """Returns the node that makes a tensor, if it is of one of the kinds."""
        node = self.producers.get(name)
        return node if node is not None and node.op_type in kinds else None

    def weight(self, node: NodeProto) -> TensorProto | None:
        """Returns the constant that a node of a pair quantizes or dequantizes; None for an activation."""
        before = self.made_by(node.input[0], Q)
        return self.weight(before) if before is not None else self.constants.get(node.input[0])

    def is_dequantized(self, name: str) -> bool:
        """Tells whether a tensor comes from a DequantizeLinear, maybe moved since."""
        while self.made_by(name, *MOVING) is not None:
            name = self.producers[name].input[0]
        return self.made_by(name, DQ) is not None

    def uses(self, name: str) -> Iterator[NodeProto]:
        """Yields the nodes that read a tensor, as it is or moved."""
        for node in self.readers[name]:
            if node.op_type in MOVING:
                for output in node.output:
                    yield from self.uses(output)
            else:
                yield node


def attribute(node: NodeProto, name: str, default: int) -> int:
    """Returns an integer attribute of a node."""
    return next((a.i for a in node.attribute if a.name == name), default)


def channel_axis(node: NodeProto, rank: int) -> int:
    """Returns which dimension of a layer's weight its output channels are.

    Args:
        node: one of :data:`LAYERS`, with the weight as second input.
        rank: number of dimensions of the weight.
    """
    if node.op_type == 'MatMul':
        return rank - 1
    if node.op_type == 'Gemm':
        return 0 if attribute(node, 'transB', 0) else 1
    return 0 if node.op_type == 'Conv' else 1
