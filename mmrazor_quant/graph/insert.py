"""Inserting fake quantizers into a captured graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor, fx, nn
from torch.fx import Node

from mmrazor_quant.compat import FakeQuantizeBase
from mmrazor_quant.tracing.nodes import node_name

from .batch_fold import quantized_layer_batch_norm
from .bias import quantized_bias
from .calls import MODULES_READ
from .layers import LAYER_TYPES, WEIGHT_QUANTIZER, channel_axis, folded_weight, quantized_layer, quantized_layer_norm
from .memory import Memory
from .norm_act import is_clamp
from .sites import (
    ADD,
    FUNCTIONAL,
    FUNCTIONAL_LAYERS,
    LAYER,
    OTHER,
    Site,
    argument,
    find_others,
    find_sites,
    is_concatenation,
)

_IDENTITIES = (nn.Identity, nn.modules.dropout._DropoutNd)
"""Modules that do nothing in a network that is deployed."""


@dataclass(frozen=True)
class WeightSite:
    """A weight and its quantizer, by path below the model.

    Args:
        quantizer: path of the fake quantizer.
        weight: path of the parameter.
        layer: path of the module that owns it.
        norm: path of the batch norm folded into it, or None.
    """

    quantizer: str
    weight: str
    layer: str
    norm: str | None = None

    def value(self, model: nn.Module) -> Tensor:
        """Returns the weight as it is quantized: with the batch norm folded in.

        Args:
            model: the model that the paths start at.
        """
        layer = model.get_submodule(self.layer)
        if self.norm is not None:
            return folded_weight(layer, model.get_submodule(self.norm))
        return getattr(layer, self.weight.rpartition('.')[2])


@dataclass
class Inserted:
    """All quantizers of a model, by path.

    Args:
        weights: the quantized weights, in execution order.
        activations: paths of the activation quantizers, in execution order.
    """

    weights: list[WeightSite] = field(default_factory=list)
    activations: list[str] = field(default_factory=list)

    def add_weight(self, site: WeightSite) -> None:
        """Adds a weight once, however many graphs use it."""
        if site not in self.weights:
            self.weights.append(site)

    def add_activation(self, path: str) -> None:
        """Adds an activation quantizer once."""
        if path not in self.activations:
            self.activations.append(path)


@dataclass
class Plan:
    """What was decided for an island when it was prepared; graphs captured later follow it.

    Args:
        folded: the pairs of layer path and path of the batch norm folded into it.
        seen: paths that the activation quantizers of all sites have or would have.
        shared: of these, the ones that are not there because the site shares another, and that one's path.
        fold_batch: whether learning batch norms are folded with the statistics of the batch, not the running ones.
        quantize_bias: whether biases are quantized too.
        residual_only: whether of the inputs of an addition only those are quantized that no layer gives to it alone.
        quantize_results: whether results of layers, activated if an activation follows, are quantized wherever they
            are read.
        every_result: whether, beyond that, those of all other operations and the model's are.
        is_last: whether the island's results are the model's, which are not.
        has_others: whether a graph was seen: further ones, for other sizes or training, have no new results.
    """

    folded: dict[str, str] = field(default_factory=dict)
    fold_batch: bool = False
    quantize_bias: bool = False
    residual_only: bool = False
    quantize_results: bool = False
    every_result: bool = False
    is_last: bool = False
    seen: set[str] = field(default_factory=set)
    shared: dict[str, str] = field(default_factory=dict)
    has_others: bool = False


MakeQuantizer = Callable[[Site, str, 'tuple[int, ...]', int], 'nn.Module | None']
"""``make(site, 'w' or 'a', shape, axis)``: a fake quantizer, or None where the configuration says float."""


def insert(
    graph: fx.Graph, root: nn.Module, prefix: str, make: MakeQuantizer, inserted: Inserted, plan: Plan
) -> fx.Graph:
    """Inserts quantizers into a graph, in place, attaching to ``root`` those that do not exist yet.

    Each activation quantizer is a child of the layer (or of the module in whose forward the function is called)
    whose input it quantizes; inputs of several sites that read the same tensor share the quantizer of the first.

    Args:
        graph: captured and folded graph.
        root: the island's module.
        prefix: path of the island in the model.
        make: makes the quantizer of a site.
        inserted: record of the model's quantizers that is added to.
        plan: record of this island's decisions that is followed and added to.

    Returns:
        The graph.
    """
    pass_ = _Insertion(graph, root, prefix, make, inserted, plan)
    sites = find_sites(graph, root)
    for site in sites:
        pass_.quantize(site)
    if plan.quantize_results:
        pass_.quantize_results(sites)
    graph.lint()
    return graph


class _Insertion:
    def __init__(
        self, graph: fx.Graph, root: nn.Module, prefix: str, make: MakeQuantizer, inserted: Inserted, plan: Plan
    ) -> None:
        self.graph, self.root, self.prefix, self.make = graph, root, prefix, make
        self.inserted, self.plan = inserted, plan
        self.memory = Memory(graph, root)
        # Of every tensor and configuration, the site that was quantized last and its quantizer's path and node.
        self.shared: dict[tuple[Node, str], tuple[Node, str, Node]] = {}
        # Paths of the activation quantizers of this graph.
        self.quantizers: set[str] = set()
        # Layers are replaced on the way; the sites name the nodes that there were.
        self.replaced: dict[Node, Node] = {}

    def quantize(self, site: Site) -> None:
        skipped = self._branch(site) if site.kind == ADD and self.plan.residual_only else None
        for position, source in enumerate(site.activations):
            if source is not skipped:
                self._activation(site, position, source)
        if site.kind == LAYER:
            self._layer_weight(site)
        elif site.kind == FUNCTIONAL:
            self._functional_weight(site)

    def quantize_results(self, sites: list[Site]) -> None:
        """Has what reads the results of layers read them quantized, but for sites that are to read float tensors."""
        operations = {self.replaced.get(site.node, site.node) for site in sites}
        if self.plan.every_result:
            sites = [*sites, *find_others(self.graph, self.root)]
        for site in sites:
            if self.plan.every_result or site.kind in (LAYER, FUNCTIONAL):
                self._result(site, operations)
        self.plan.has_others = True

    def _result(self, site: Site, operations: set[Node]) -> None:
        result = self._activated(self.replaced.get(site.node, site.node))
        if self.plan.every_result and all(map(is_concatenation, result.users)):
            # The parts get the grid of the whole.
            return
        readers = [user for user in result.users if not self._is_quantizer(user) and user not in operations]
        if not readers or (self._is_float_result(result) and not self.plan.every_result):
            return
        tensor = site.node if result is self.replaced.get(site.node) else result
        # A reader that is alone may write to the quantized tensor instead.
        last = next(iter(reversed(self.graph.nodes)))
        if len(result.users) > 1 and self.memory.is_written_between(tensor, tensor, last):
            return
        node = max(filter(self._is_quantizer, result.users), key=self._levels, default=None)
        if node is None:
            node = self._new_result(site, result)
        if node is not None:
            for user in readers:
                user.replace_input_with(result, node)
            self._move_behind(node, result)

    def _is_float_result(self, result: Node) -> bool:
        return self.plan.is_last and all(user.op == 'output' for user in result.users)

    def _new_result(self, site: Site, result: Node) -> Node | None:
        own = site.result_quantizer_path()
        self.plan.seen.add(own)
        quantizer = _existing(self.root, own)
        if quantizer is None and not (site.kind == OTHER and self.plan.has_others):
            quantizer = self.make(site, 'a', result.meta.get('shape', ()), -1)
        if quantizer is None:
            return None
        attach(self.root, own, quantizer)
        self.inserted.add_activation(self._full(own))
        with self.graph.inserting_after(result):
            node = self.graph.call_module(own, (result,))
        node.meta = dict(result.meta)
        return node

    def _activated(self, node: Node) -> Node:
        """Returns the activation behind a layer that kernels of layers can take in, or the layer."""
        (user,) = node.users if len(node.users) == 1 else (None,)
        if user is None or not (is_clamp(user, self.root) or self._is_identity(user)):
            return node
        return self._activated(user)

    def _is_identity(self, node: Node) -> bool:
        return node.op == 'call_module' and isinstance(self.root.get_submodule(node.target), nn.Identity)

    def _is_quantizer(self, node: Node) -> bool:
        return node.op == 'call_module' and isinstance(self.root.get_submodule(node.target), FakeQuantizeBase)

    def _levels(self, node: Node) -> int:
        quantizer = self.root.get_submodule(node.target)
        return quantizer.quant_max - quantizer.quant_min

    def _move_behind(self, node: Node, result: Node) -> None:
        """Has a quantizer run at once, since readers before it may read it now."""
        if node.prev is not result:
            result.append(node)

    def _branch(self, site: Site) -> Node | None:
        """Returns the input of an addition that a layer gives to it alone; of two, the one that is computed last."""
        current = {source: self.replaced.get(source, source) for source in site.activations}
        found = [source for source, node in current.items() if self._is_read_once(node) and self._is_layer(node)]
        order = {node: i for i, node in enumerate(self.graph.nodes)}
        return max(found, key=lambda source: order[current[source]], default=None)

    def _is_read_once(self, node: Node) -> bool:
        """Whether one operation reads the values; what reads the shape does not count."""
        return len([user for user in node.users if node_name(user) not in ('getattr', 'size', 'dim')]) == 1

    def _is_layer(self, node: Node) -> bool:
        if node.op == 'call_function':
            return node.target in MODULES_READ or node.target in FUNCTIONAL_LAYERS
        if node.op != 'call_module':
            return False
        module = self.root.get_submodule(node.target)
        return isinstance(module, LAYER_TYPES) or (isinstance(module, _IDENTITIES) and self._is_layer(node.args[0]))

    def _activation(self, site: Site, position: int, source: Node) -> None:
        own = site.quantizer_path(position)
        self.plan.seen.add(own)
        path, quantizer = self._quantizer_of(site, own, source)
        if quantizer is None:
            return
        key = (source, repr_config(quantizer))
        current = self.replaced.get(source, source)
        node = self._shared(key, site, own)
        if node is None:
            node = self._new_activation(site, path, quantizer, current)
            self.shared[key] = (site.node, path, node)
        site.node.replace_input_with(current, node)

    def _quantizer_of(self, site: Site, own: str, source: Node) -> tuple[str | None, nn.Module | None]:
        """Returns the quantizer of a site with its path: its own, a new one, or the one it shared when prepared."""
        quantizer = _existing(self.root, own)
        if quantizer is None:
            quantizer = self.make(site, 'a', source.meta.get('shape', ()), -1)
        if quantizer is not None:
            return own, quantizer
        path = self.plan.shared.get(own)
        return path, _existing(self.root, path)

    def _shared(self, key: tuple[Node, str], site: Site, own: str) -> Node | None:
        """Returns the quantized tensor that an earlier site made, unless it was written to since."""
        if key not in self.shared:
            return None
        first, path, node = self.shared[key]
        if self.memory.is_written_between(key[0], first, site.node):
            return None
        if path != own and _existing(self.root, own) is None:
            self.plan.shared[own] = path
        return node

    def _new_activation(self, site: Site, path: str, quantizer: nn.Module, source: Node) -> Node:
        attach(self.root, path, quantizer)
        self.inserted.add_activation(self._full(path))
        self.quantizers.add(path)
        with self.graph.inserting_before(site.node):
            node = self.graph.call_module(path, (source,))
        node.meta = dict(source.meta)
        return node

    def _layer_weight(self, site: Site) -> None:
        path = f'{site.owner}.{WEIGHT_QUANTIZER}'.lstrip('.')
        layer = self.root.get_submodule(site.owner)
        axis = channel_axis(layer)
        if not self._has_weight_quantizer(site, path, tuple(layer.weight.shape), axis):
            self._restore_norm(site)
            return
        norm = site.node.meta.get('folded_norm')
        self.inserted.add_weight(
            WeightSite(self._full(path), self._full(f"{site.owner}.weight"), self._full(site.owner),
                       None if norm is None else self._full(norm))
        )  # fmt: skip
        self._replace_call(site.node, norm)

    def _replace_call(self, node: Node, norm: str | None) -> None:
        modules = [node.target] if norm is None else [node.target, norm]
        folding = quantized_layer_batch_norm if self.plan.fold_batch else quantized_layer_norm
        function = quantized_layer if norm is None else folding
        quantizer = self._input_quantizer(node)
        with self.graph.inserting_before(node):
            attributes = [self.graph.get_attr(path) for path in modules]
            bias_input = {} if quantizer is None else dict(bias_input=self.graph.get_attr(quantizer))
            new = self.graph.call_function(function, (*attributes, *node.args), {**node.kwargs, **bias_input})
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        self.graph.erase_node(node)
        self.replaced[node] = new

    def _input_quantizer(self, node: Node) -> str | None:
        """Returns the path of the quantizer of a layer's input, if biases are to be quantized with its scale."""
        source = node.all_input_nodes[0]
        is_quantized = source.op == 'call_module' and source.target in self.quantizers
        return source.target if self.plan.quantize_bias and is_quantized else None

    def _restore_norm(self, site: Site) -> None:
        """A layer that stays float keeps its batch norm as an operation of its own."""
        norm = site.node.meta.pop('folded_norm', None)
        if norm is None:
            return
        with self.graph.inserting_after(site.node):
            node = self.graph.call_module(norm)
        node.meta = dict(site.node.meta)
        site.node.replace_all_uses_with(node)
        node.args = (site.node,)
        self.replaced[site.node] = node

    def _functional_weight(self, site: Site) -> None:
        weight, axis = site.weight, FUNCTIONAL_LAYERS[site.node.target]
        parameter = weight.op == 'get_attr'
        path = f'{weight.target}_fake_quant' if parameter else site.weight_quantizer_path()
        if not self._has_weight_quantizer(site, path, tuple(weight.meta['shape']), axis):
            return
        if parameter:
            owner = weight.target.rpartition('.')[0]
            self.inserted.add_weight(WeightSite(self._full(path), self._full(weight.target), self._full(owner)))
        else:
            self.inserted.add_activation(self._full(path))
        weight = self.replaced.get(weight, weight)
        with self.graph.inserting_before(site.node):
            node = self.graph.call_module(path, (weight,))
        node.meta = dict(weight.meta)
        site.node.replace_input_with(weight, node)
        self._functional_bias(site.node, path)

    def _functional_bias(self, node: Node, weight_quantizer: str) -> None:
        bias = argument(node, 2, 'bias')
        source = self._input_quantizer(node)
        if source is None or not isinstance(bias, Node):
            return
        with self.graph.inserting_before(node):
            quantizers = [self.graph.get_attr(path) for path in (source, weight_quantizer)]
            new = self.graph.call_function(quantized_bias, (bias, *quantizers))
        new.meta = dict(bias.meta)
        node.replace_input_with(bias, new)

    def _has_weight_quantizer(self, site: Site, path: str, shape: tuple[int, ...], axis: int) -> bool:
        if _existing(self.root, path) is None:
            quantizer = self.make(site, 'w', shape, axis)
            if quantizer is None:
                return False
            attach(self.root, path, quantizer)
        return True

    def _full(self, path: str) -> str:
        return f'{self.prefix}.{path}'.strip('.')


def attach(root: nn.Module, path: str, module: nn.Module) -> None:
    """Makes ``module`` the child of ``root`` at ``path``, whose parent exists."""
    parent, _, name = path.rpartition('.')
    owner = root.get_submodule(parent)
    if owner._modules.get(name) is not module:
        owner.add_module(name, module)


def repr_config(quantizer: nn.Module) -> str:
    """Returns what two quantizers must have in common to be one: how they were configured."""
    return repr(getattr(quantizer, 'config', type(quantizer)))


def _existing(root: nn.Module, path: str | None) -> nn.Module | None:
    if path is None:
        return None
    try:
        return root.get_submodule(path)
    except AttributeError:
        return None
