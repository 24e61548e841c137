"""A quantized model that computes as its backend does, in PyTorch."""

from __future__ import annotations

import copy
import functools
import importlib
import importlib.util
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, fx, nn
from torch.fx import Node

from mmrazor_quant.compat import FakeQuantizeBase
from mmrazor_quant.graph.layers import LAYER_TYPES, PLAIN_FORWARDS, call_layer, channel_axis
from mmrazor_quant.graph.sites import ADD, find_sites
from mmrazor_quant.tracing.island import Island, islands_of
from mmrazor_quant.tracing.nodes import node_name

from .arithmetic import Arithmetic, LayerScales, can_convolve
from .grid import QuantGrid
from .intermediate import bake_with_grids

_EXACT = 2**24
"""Up to here all integers are floats of 32 bits."""

_MOVES = frozenset({
    'view', 'reshape', 'flatten', 'permute', 'transpose', 'contiguous', 'unsqueeze', 'squeeze', 'max_pool2d',
})  # fmt: skip
_MOVING_MODULES = (nn.Identity, nn.Flatten, nn.MaxPool2d, nn.modules.dropout._DropoutNd)
_MONOTONE = frozenset({'relu', 'relu_', 'relu6', 'hardtanh', 'clamp'})
_MONOTONE_MODULES = (nn.ReLU, nn.ReLU6, nn.Hardtanh)
"""Operations that give the same whether rounding to a grid that has their bounds comes before them or behind."""


_NOT_NEGATIVE = frozenset({'relu', 'relu_', 'sigmoid', 'sigmoid_', 'softmax'})
_NOT_NEGATIVE_MODULES = (nn.ReLU, nn.Sigmoid, nn.Softmax)
_KEEP_SIGNS = frozenset({'view', 'reshape', 'flatten', 'max_pool2d', 'avg_pool2d', 'adaptive_avg_pool2d'})
_KEEP_SIGNS_MODULES = (nn.Identity, nn.Flatten, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d)
"""What :mod:`.qdq` names as operations of ONNX."""

_OWN = 'simulated'
"""The attribute of an island that has what takes the place of its operations; no child, which the module may run."""

_GRID = '_grid'
"""Behind the name of a weight: the attribute that has its grid."""


def arithmetic_of(backend: str) -> Arithmetic | None:
    """Returns how a backend computes; None where that is not known.

    Args:
        backend: name of the backend.
    """
    name = f'mmrazor_quant.backends.{backend}.arithmetic'
    return None if importlib.util.find_spec(name) is None else importlib.import_module(name).ARITHMETIC


def simulated(model: nn.Module, arithmetic: Arithmetic) -> nn.Module:
    """Makes an architecture that computes as a backend does: quantizers, layers in integers, additions.

    So do convolutions in float, sigmoid and SiLU, where the arithmetic has them; everything else is PyTorch's.

    Args:
        model: a calibrated or trained :class:`mmrazor_quant.algorithms.GeneralQuant`; left as it is.
        arithmetic: how the backend computes.

    Returns:
        A copy of its architecture, for evaluation, where the model is.

    Raises:
        ValueError: a fake quantizer that has no grid of whole numbers.
        RuntimeError: the model is not calibrated.
    """
    network, weights, _ = bake_with_grids(model)
    parameter = next(model.parameters(), None)
    # Before layers are looked at: which type is exact hangs on the device.
    network = network if parameter is None else network.to(parameter.device)
    for path, grid in weights.items():
        owner, _, name = path.rpartition('.')
        setattr(network.get_submodule(owner), f'{name}{_GRID}', grid)
    for module in islands_of(network).values():
        island = Island.of(module)
        island.map_graphs(functools.partial(_put_into_integers, root=module, arithmetic=arithmetic))
        island.recapture = functools.partial(_recapture, island.recapture, arithmetic)
    return network.eval()


class Quantize(nn.Module):
    """An activation quantizer in a backend's arithmetic.

    Args:
        grid: what it quantizes to.
        quantize: ``(x, grid)``: values in steps of the grid, rounded.
    """

    def __init__(self, grid: QuantGrid, quantize: Callable[[Tensor, QuantGrid], Tensor]) -> None:
        super().__init__()
        self.grid, self.quantize = grid, quantize
        zero_point = int(grid.zero_point[0])
        self.ends = grid.quant_min - zero_point, grid.quant_max - zero_point

    def forward(self, x: Tensor) -> Tensor:
        """Fake-quantize."""
        return self.quantize(x, self.grid).clamp_(*self.ends).mul_(float(self.grid.scale[0]))


class IntegerLayer(nn.Module):
    """One call of a layer in integers.

    Args:
        layer: convolution or linear layer with a baked weight.
        weight: grid of the weight.
        source: grid of the input.
        result: grid of the result; None: it has none.
        arithmetic: how the backend computes.
    """

    def __init__(
        self, layer: nn.Module, weight: QuantGrid, source: QuantGrid, result: QuantGrid | None, arithmetic: Arithmetic
    ) -> None:
        super().__init__()
        self.layer, self.arithmetic = layer, arithmetic
        self.step = float(source.scale[0])
        device = layer.weight.device
        integers = _integers(layer.weight, weight)
        bias = None if layer.bias is None else _per_output(layer.bias.detach().cpu(), layer)
        scale = _per_output(torch.from_numpy(weight.scale.copy()), layer)
        self.scales = LayerScales(torch.tensor(self.step), scale, result, _is_depthwise(layer))
        factor = arithmetic.factor(self.scales)
        start = None
        if arithmetic.integer_bias and bias is not None:
            start, bias = torch.round(bias / (self.step * scale)).flatten(), None
        # Elsewhere than on CPU products of the type of 32 bits may be rounded.
        is_small = device.type == 'cpu' and _largest_sum(layer, integers, source, start) < _EXACT
        kind = torch.float32 if is_small else torch.float64
        buffers = {'weight': integers.to(kind), 'start': None if start is None else start.to(kind)}
        for name, tensor in {**buffers, 'factor': factor, 'bias': bias}.items():
            self.register_buffer(name, None if tensor is None else tensor.to(device), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Run the layer on values that lie on the grid of its input."""
        integers = torch.round(x / self.step).to(self.weight.dtype)
        sums = call_layer(self.layer, integers, self.weight, self.start)
        return self.arithmetic.layer(sums.to(torch.float32), self.factor, self.bias, self.scales)


def _integers(weight: Tensor, grid: QuantGrid) -> Tensor:
    """Returns the integers of a baked weight, without the zero point."""
    values = weight.detach().cpu().float().numpy()
    shape = [-1 if d == grid.ch_axis else 1 for d in range(values.ndim)]
    return torch.from_numpy(grid.integers(values) - grid.zero_point.reshape(shape))


def _largest_sum(layer: nn.Module, integers: Tensor, source: QuantGrid, start: Tensor | None) -> float:
    """Returns what no sum of a layer exceeds."""
    largest = max(abs(end - int(source.zero_point[0])) for end in (source.quant_min, source.quant_max))
    sums = integers.abs().movedim(channel_axis(layer), 0).flatten(1).sum(1).max().item() * largest
    return sums if start is None else sums + start.abs().max().item()


def _is_depthwise(layer: nn.Module) -> bool:
    return layer.weight.dim() > 2 and layer.groups == layer.in_channels == layer.out_channels


class FloatLayer(nn.Module):
    """A convolution in float, as a backend adds its products.

    Args:
        layer: the convolution.
        arithmetic: how the backend computes.
    """

    def __init__(self, layer: nn.Conv2d, arithmetic: Arithmetic) -> None:
        super().__init__()
        self.layer, self.arithmetic = layer, arithmetic

    def forward(self, x: Tensor) -> Tensor:
        """Run the layer."""
        return self.arithmetic.convolve(self.layer, x)


class Logistic(nn.Module):
    """Sigmoid, or SiLU, in a backend's arithmetic.

    Args:
        function: the function of float32 values.
    """

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        """Apply it."""
        return self.function(x)


class _Silu:
    """SiLU by way of a logistic function."""

    def __init__(self, sigmoid: Callable[[Tensor], Tensor]) -> None:
        self.sigmoid = sigmoid

    def __call__(self, x: Tensor) -> Tensor:
        return x * self.sigmoid(x)


class Addition(nn.Module):
    """An addition and the quantization of the sum, as one.

    Args:
        grids: of both inputs; None for the first if it is not quantized.
        result: grid of the sum.
        arithmetic: how the backend computes.
    """

    def __init__(self, grids: Sequence[QuantGrid | None], result: QuantGrid, arithmetic: Arithmetic) -> None:
        super().__init__()
        self.grids, self.result, self.arithmetic = grids, result, arithmetic

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Add."""
        first, second = self.grids
        if first is None:
            return self.arithmetic.add(x, y, second, self.result)
        return self.arithmetic.add_quantized(x, first, y, second, self.result)


def _per_output(values: Tensor, layer: nn.Module) -> Tensor:
    """Gives values per channel, or one for all, the shape that fits a layer's results."""
    if isinstance(layer, nn.Linear):
        return values
    if values.numel() > 1:  # a transposed convolution has one per channel of each group
        values = values.repeat(layer.out_channels // values.numel())
    return values.reshape(-1, *[1] * len(layer.kernel_size))


def _recapture(
    recapture: Callable[..., fx.Graph], arithmetic: Arithmetic, module: nn.Module, *call: object
) -> fx.Graph:
    return _put_into_integers(recapture(module, *call), module, arithmetic)


def _put_into_integers(graph: fx.Graph, root: nn.Module, arithmetic: Arithmetic) -> fx.Graph:
    """Replaces quantizers, layers of which the weight, the input and maybe the result are quantized, and additions."""
    graph = copy.deepcopy(graph)
    for node in graph.nodes:
        _replace_quantizer(node, root, arithmetic)
    adds = {site.node for site in find_sites(graph, root) if site.kind == ADD}
    for node in list(graph.nodes):
        if node in adds:
            _replace_add(node, root, arithmetic)
        elif node.op == 'call_module':
            _replace_layer(node, root, arithmetic)
        _replace_logistic(node, root, arithmetic)
    graph.lint()
    return graph


def _replace_layer(node: Node, root: nn.Module, arithmetic: Arithmetic) -> None:
    layer = root.get_submodule(node.target)
    if not isinstance(layer, LAYER_TYPES) or type(layer).forward not in PLAIN_FORWARDS:
        return
    x, weight = node.all_input_nodes[0], getattr(layer, f'weight{_GRID}', None)
    source, result = _grid_of(x, root), _grid_behind(node, root)
    if len(node.args) + len(node.kwargs) > 1:  # the size of a transposed convolution's result
        return
    if weight is not None and source is not None and (result is not None or not arithmetic.needs_result):
        _call_instead(node, root, IntegerLayer(layer, weight, source, result, arithmetic), x)
    elif arithmetic.convolve is not None and can_convolve(layer):
        _call_instead(node, root, FloatLayer(layer, arithmetic), x)


def _replace_add(node: Node, root: nn.Module, arithmetic: Arithmetic) -> None:
    inputs, result = node.all_input_nodes, _grid_behind(node, root)
    if result is None or node.kwargs:
        return
    grids = [_grid_of(source, root) for source in inputs]
    quantized = [source for source, grid in zip(inputs, grids) if grid is not None]
    if len(quantized) == 2 and arithmetic.add_quantized is not None:
        _call_instead(node, root, Addition(grids, result, arithmetic), *inputs)
    elif len(quantized) == 1 and arithmetic.add is not None:
        # What is not quantized comes first.
        order = sorted(zip(grids, inputs), key=lambda pair: pair[0] is not None)
        _call_instead(node, root, Addition([g for g, _ in order], result, arithmetic), *(n for _, n in order))


def _replace_quantizer(node: Node, root: nn.Module, arithmetic: Arithmetic) -> None:
    if node.op != 'call_module' or not isinstance(root.get_submodule(node.target), FakeQuantizeBase):
        return
    source = node.args[0]
    grid = QuantGrid.of(root.get_submodule(node.target), node.target)
    if arithmetic.stored is not None:
        grid = arithmetic.stored(grid, _is_not_negative(source, root))
    is_apart = arithmetic.quantize_apart is not None and len(source.users) > 1
    quantize = arithmetic.quantize_apart if is_apart else arithmetic.quantize
    _call_instead(node, root, Quantize(grid, quantize), source)


def _is_not_negative(node: Node, root: nn.Module) -> bool:
    """Tells whether values come from an operation without negative results, as the exporter looks for it."""
    while not _is_of(node, root, _NOT_NEGATIVE, _NOT_NEGATIVE_MODULES):
        if not _is_of(node, root, _KEEP_SIGNS, _KEEP_SIGNS_MODULES):
            return False
        node = node.all_input_nodes[0]
    return True


def _replace_logistic(node: Node, root: nn.Module, arithmetic: Arithmetic) -> None:
    sigmoid, silu = arithmetic.sigmoid, arithmetic.silu
    if sigmoid is None:
        return
    if _is_of(node, root, frozenset({'sigmoid'}), (nn.Sigmoid,)):
        _call_instead(node, root, Logistic(sigmoid), node.all_input_nodes[0])
    elif _is_of(node, root, frozenset({'silu'}), (nn.SiLU,)):
        _call_instead(node, root, Logistic(silu or _Silu(sigmoid)), node.all_input_nodes[0])
    elif silu is not None and (argument := _argument_of_silu(node, root)) is not None:
        _call_instead(node, root, Logistic(silu), argument)


def _argument_of_silu(node: Node, root: nn.Module) -> Node | None:
    """Returns x where a node multiplies x and its sigmoid."""
    inputs = node.all_input_nodes
    if node.op == 'call_module' or node_name(node) != 'mul' or len(inputs) != 2:
        return None
    for x, other in (inputs, inputs[::-1]):
        if _is_of(other, root, frozenset({'sigmoid'}), (nn.Sigmoid, Logistic)) and other.all_input_nodes == [x]:
            return x
    return None


def _call_instead(node: Node, root: nn.Module, module: nn.Module, *arguments: Node) -> None:
    """Makes of a node the call of a module of our own."""
    others = [source for source in node.all_input_nodes if source not in arguments]
    modules = vars(root).setdefault(_OWN, nn.ModuleDict())
    name = f'call_{len(modules)}'
    modules[name] = module
    node.op, node.target, node.args, node.kwargs = 'call_module', f'{_OWN}.{name}', arguments, {}
    for other in others:
        if not other.users:
            node.graph.erase_node(other)


def _grid_of(node: Node, root: nn.Module) -> QuantGrid | None:
    """Returns the grid that the values of a node lie on."""
    quantizer = _quantizer(node, root)
    if quantizer is not None:
        return quantizer.grid
    if _is_of(node, root, _MOVES, _MOVING_MODULES):
        return _grid_of(node.all_input_nodes[0], root)
    return None


def _grid_behind(node: Node, root: nn.Module) -> QuantGrid | None:
    """Returns the grid that all readers of a node quantize it to."""
    grids = []
    for user in node.users:
        quantizer = _quantizer(user, root)
        if quantizer is not None:
            grids.append(quantizer.grid)
        elif _is_of(user, root, _MOVES | _MONOTONE, _MOVING_MODULES + _MONOTONE_MODULES):
            grids.append(_grid_behind(user, root))
        else:
            return None
    if any(grid is None for grid in grids):
        return None
    different = {(float(grid.scale[0]), int(grid.zero_point[0])) for grid in grids}
    return grids[0] if len(different) == 1 else None


def _quantizer(node: Node, root: nn.Module) -> Quantize | None:
    module = root.get_submodule(node.target) if node.op == 'call_module' else None
    return module if isinstance(module, Quantize) else None


def _is_of(node: Node, root: nn.Module, names: frozenset[str], modules: tuple[type, ...]) -> bool:
    if node.op == 'call_module':
        return isinstance(root.get_submodule(node.target), modules)
    return node.op in ('call_function', 'call_method') and node_name(node) in names
