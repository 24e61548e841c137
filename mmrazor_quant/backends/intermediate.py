"""The form that all backends start from: ONNX with one custom node per fake quantizer, and the grids of the weights.

Activation quantizers are nodes ``mmrazor_quant::FakeQuant(x, scale, zero_point)`` with the attributes ``axis``,
``quant_min`` and ``quant_max``, dynamic ones ``mmrazor_quant::DynamicFakeQuant(x)``. Weights are float initializers
that lie on their grid, batch norms are folded; what integers they are is known by the names of the initializers, which
are those of the parameters.
"""

from __future__ import annotations

import contextlib
import copy
import io
import operator
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import onnx
import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from mmrazor_quant import ops
from mmrazor_quant.fake_quants import DynamicFakeQuantize
from mmrazor_quant.graph.fold import bake_norms
from mmrazor_quant.tracing.island import Island, islands_of

from .grid import QuantGrid

DOMAIN, FAKE_QUANT, DYNAMIC_FAKE_QUANT = 'mmrazor_quant', 'FakeQuant', 'DynamicFakeQuant'
OPSET = 17

PREFIX = 'network.'
"""What the names of initializers have before the path of the parameter."""


@dataclass
class Intermediate:
    """A network as backends take it.

    Args:
        onnx: the network; its input is ``input``, its outputs are ``output_0`` and so on.
        weights: grids of the integer weights, by name of the initializer.
        activations: grids of the activation quantizers, by path below the architecture.
        module: what ``onnx`` was made of, on CPU, for backends that do not start from ONNX: a module whose outputs are
            a tuple of tensors and whose activation quantizers are :class:`FakeQuantNode`. The names of ``weights`` are
            paths below it.
        images: the example images.
        dynamic: dimensions of the images that may vary.
    """

    onnx: onnx.ModelProto
    weights: dict[str, QuantGrid]
    activations: dict[str, QuantGrid]
    module: nn.Module
    images: Tensor
    dynamic: tuple[int, ...] = ()


class _Emit(torch.autograd.Function):
    """Fake quantization that the exporter writes as one node."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, axis: int, quant_min: int, quant_max: int):
        return ops.fake_quantize(x, scale, zero_point, quant_min, quant_max, axis)

    @staticmethod
    def symbolic(g: Any, x: Any, scale: Any, zero_point: Any, axis: int, quant_min: int, quant_max: int) -> Any:
        node = g.op(
            f'{DOMAIN}::{FAKE_QUANT}', x, scale, zero_point, axis_i=axis, quant_min_i=quant_min, quant_max_i=quant_max
        )
        node.setType(x.type())
        return node


class FakeQuantNode(nn.Module):
    """Stands for an activation quantizer in a network to be exported.

    Args:
        grid: what it quantizes to.
    """

    def __init__(self, grid: QuantGrid) -> None:
        super().__init__()
        self.register_buffer('scale', torch.from_numpy(grid.scale.copy()))
        self.register_buffer('zero_point', torch.from_numpy(grid.zero_point.copy()))
        self.grid = grid
        self.has_run = False
        self.numbers = grid.ch_axis, grid.quant_min, grid.quant_max

    def forward(self, x: Tensor) -> Tensor:
        """Fake-quantize."""
        self.has_run = True
        return _Emit.apply(x, self.scale, self.zero_point, *self.numbers)


class _EmitDynamic(torch.autograd.Function):
    """Dynamic fake quantization that the exporter writes as one node."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, quantizer: nn.Module) -> Tensor:
        return quantizer(x)

    @staticmethod
    def symbolic(g: Any, x: Any, quantizer: nn.Module) -> Any:
        node = g.op(f'{DOMAIN}::{DYNAMIC_FAKE_QUANT}', x)
        node.setType(x.type())
        return node


class DynamicFakeQuantNode(nn.Module):
    """Stands for a dynamic activation quantizer in a network to be exported.

    Args:
        quantizer: the quantizer.
    """

    def __init__(self, quantizer: DynamicFakeQuantize) -> None:
        super().__init__()
        self.quantizer, self.has_run = quantizer, False

    def forward(self, x: Tensor) -> Tensor:
        """Fake-quantize."""
        self.has_run = True
        return _EmitDynamic.apply(x, self.quantizer)


NODES = FakeQuantNode, DynamicFakeQuantNode


def tensors_of(outputs: Any) -> list[Tensor]:
    """Returns the tensors among outputs nested in any way."""
    return [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]


class _Tensors(nn.Module):
    """A network whose outputs are taken out of whatever they are nested in."""

    def __init__(self, network: nn.Module, forward: Callable[[nn.Module, Tensor], Any]) -> None:
        super().__init__()
        self.network, self.run = network, forward

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensors_of(self.run(self.network, x)))


def export_intermediate(
    model: nn.Module,
    images: Tensor,
    forward: Callable[[nn.Module, Tensor], Any],
    dynamic: Sequence[int] = (),
) -> Intermediate:
    """Exports a calibrated or trained model.

    Args:
        model: a :class:`mmrazor_quant.algorithms.GeneralQuant`; left as it is.
        images: preprocessed example images, shape (batch, channels, height, width).
        forward: runs the architecture on images up to what is exported.
        dynamic: dimensions of the images that may vary: 0 for the batch, 2 and 3 for the size.

    Returns:
        The network.

    Raises:
        ValueError: a fake quantizer that has no grid of whole numbers.
        RuntimeError: the model is not calibrated.
    """
    network, weights, activations = bake_with_grids(model)
    nodes = {path: FakeQuantNode(grid) for path, grid in activations.items()}
    dynamic_quantizers = {p: m for p, m in network.named_modules() if isinstance(m, DynamicFakeQuantize)}
    nodes |= {path: DynamicFakeQuantNode(quantizer) for path, quantizer in dynamic_quantizers.items()}
    for path, node in nodes.items():
        network.set_submodule(path, node)
    module, images = _Tensors(network, forward).eval(), images.cpu()
    proto = _export(module, images, dynamic)
    named = {_initializer_name(network, weight): grid for weight, grid in weights.items()}
    return Intermediate(proto, named, activations, module, images, tuple(dynamic))


def bake_with_grids(model: nn.Module) -> tuple[nn.Module, dict[str, QuantGrid], dict[str, QuantGrid]]:
    """Bakes a calibrated or trained model and returns what its quantizers quantize to.

    Args:
        model: a :class:`mmrazor_quant.algorithms.GeneralQuant`; left as it is.

    Returns:
        A copy of its architecture, on the CPU, with baked weights and batch norms; the grids of the weights, by path
        of the parameter; those of the activation quantizers, by path, but for dynamic ones.

    Raises:
        ValueError: a fake quantizer that has no grid of whole numbers.
        RuntimeError: the model is not calibrated.
    """
    model = copy.deepcopy(model).cpu().eval()
    model.set_quant_state(False, True, False, True)
    _settle_weights(model)
    static = [(path, m) for path, m in model.act_quantizers() if not isinstance(m, DynamicFakeQuantize)]
    grids = {path: QuantGrid.of(quantizer, path) for path, quantizer in (*model.weight_quantizers(), *static)}
    weights = {site.weight: grids[site.quantizer] for site in model.inserted.weights}
    activations = {path: grids[path] for path, _ in static}
    _check_activations(activations)
    network = model.bake()
    _fold_float_layers(network, weights)
    return network, weights, activations


def _fold_float_layers(network: nn.Module, weights: Iterable[str]) -> None:
    """Folds the batch norms of float layers: every backend does, each with roundings of its own."""
    roots = list(islands_of(network).values())
    counts = Counter(module for root in roots for module in root.modules())
    quantized = {network.get_submodule(path.rpartition('.')[0]) for path in weights}
    kept = quantized | {module for module, count in counts.items() if count > 1}
    for root in roots:
        bake_norms(list(Island.of(root).graphs()), root, kept)


def without_quantizers(network: Intermediate) -> Intermediate:
    """Returns the same network in float, with the values of the quantized weights; a network of its own.

    Args:
        network: the network.
    """
    proto = copy.deepcopy(network.onnx)
    nodes, passed = [], {}
    for node in proto.graph.node:
        node.input[:] = [passed.get(name, name) for name in node.input]
        if node.domain == DOMAIN:
            passed[node.output[0]] = node.input[0]
        else:
            nodes.append(node)
    outputs = [o.name for o in proto.graph.output if o.name in passed]
    nodes += [onnx.helper.make_node('Identity', [passed[name]], [name]) for name in outputs]
    kept = [copy.deepcopy(node) for node in nodes]
    del proto.graph.node[:]
    proto.graph.node.extend(kept)
    module = copy.deepcopy(network.module)
    for path, child in list(module.named_modules()):
        if isinstance(child, NODES):
            module.set_submodule(path, nn.Identity())
    return Intermediate(proto, {}, {}, module, network.images, network.dynamic)


@torch.no_grad()
def _settle_weights(model: nn.Module) -> None:
    """Runs the quantizers of weights once: some have a scale that follows from the very weight."""
    for site in model.inserted.weights:
        model.architecture.get_submodule(site.quantizer)(site.value(model.architecture))


def _check_activations(activations: dict[str, QuantGrid]) -> None:
    for path, grid in activations.items():
        if grid.ch_axis != -1:
            raise ValueError(
                f'{path}: got one scale per channel, allowed in files: one per tensor (a weight that is computed, not '
                'a parameter, is quantized as an activation)'
            )


def _initializer_name(network: nn.Module, weight: str) -> str:
    """Returns the name that the exporter gives a parameter: of several, the first."""
    wanted = operator.attrgetter(weight)(network)
    tensors = (*network.named_parameters(), *network.named_buffers())
    return PREFIX + next(name for name, tensor in tensors if tensor is wanted)


@torch.no_grad()
def _export(network: nn.Module, images: Tensor, dynamic: Sequence[int]) -> onnx.ModelProto:
    outputs = [f'output_{i}' for i in range(len(network(images)))]
    expected = _take_run(network)
    axes = {'input': {d: f'dim_{d}' for d in dynamic}} if dynamic else {}
    axes.update({name: {d: f'{name}_{d}' for d in dynamic} for name in outputs} if dynamic else {})
    file = io.BytesIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        # Python numbers become constants of the file: sizes, unless they are dynamic.
        warnings.simplefilter('ignore', torch.jit.TracerWarning)
        warnings.simplefilter('ignore', DeprecationWarning)
        warnings.filterwarnings('ignore', category=UserWarning, module='torch')
        torch.onnx.export(
            network, (images,), file, dynamo=False, opset_version=OPSET, input_names=['input'], output_names=outputs,
            dynamic_axes=axes, do_constant_folding=False, keep_initializers_as_inputs=False,
            custom_opsets={DOMAIN: 1}, autograd_inlining=False,
        )  # fmt: skip
    lost = sorted(expected - _take_run(network))
    if lost:
        raise ValueError(f'export: quantizers that run in PyTorch did not while the file was made: {", ".join(lost)}')
    return onnx.load_model_from_string(file.getvalue())


def _take_run(network: nn.Module) -> set[str]:
    """Returns the paths of the quantizers that have run since this was asked before."""
    found = {path: m for path, m in network.named_modules() if isinstance(m, NODES) and m.has_run}
    for quantizer in found.values():
        quantizer.has_run = False
    return set(found)
