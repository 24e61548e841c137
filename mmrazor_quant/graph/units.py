"""Cutting a graph into the units that are reconstructed one after the other: layers, blocks, stages, or all of it.

Blocks are found by their form, whatever their classes: where a value is read more than once and all paths from it meet
again, with no other way in, what lies between is one block: residual blocks, inverted residuals, CSP stages, both
halves of a transformer block. Short chains of layers of one module between such blocks are one as well.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from torch import fx, nn
from torch.fx import Node

from .roles import Roles

GRANULARITIES = ('layer', 'block', 'stage', 'island')
MAX_LAYERS = 16
"""A block has no more layers than this: a network with a connection from end to end is no single block."""

MAX_CHAIN = 3
"""Layers of one module in a row that are taken for a block: expansion, depthwise convolution, projection."""


@dataclass(frozen=True)
class Unit:
    """A piece of a graph.

    Args:
        name: path of the module that contains its layers, or of its only layer.
        nodes: its nodes, in execution order, without free ones.
        inputs: values from outside that it reads.
        outputs: its values that are read outside.
        weights: paths, below the island, of its weight quantizers.
        quantizers: paths of its activation quantizers.
        function_graph: a graph of its own: from the inputs to a tuple of the outputs.
    """

    name: str
    nodes: tuple[Node, ...]
    inputs: tuple[Node, ...]
    outputs: tuple[Node, ...]
    weights: tuple[str, ...]
    quantizers: tuple[str, ...]
    function_graph: fx.Graph


def find_units(graph: fx.Graph, root: nn.Module, granularity: str = 'block') -> list[Unit]:
    """Cuts a graph into units, which together are the graph, in an order in which they can run.

    Args:
        graph: graph with fake quantizers.
        root: the island's module.
        granularity: one of :data:`GRANULARITIES`.

    Returns:
        The units; none for a graph without quantized operations.
    """
    roles = Roles(graph, root)
    groups = _Groups(roles)
    if granularity == 'island':
        groups.merge(groups.members)
    if granularity in ('block', 'stage'):
        groups.merge_regions()
        groups.merge_chains()
    if granularity == 'stage':
        groups.merge_stages()
    groups.merge_shared()
    groups.merge_open_tuples()
    return [_unit(roles, nodes) for nodes in groups.ordered()]


class _Groups:
    """A partition of the nodes that are not free, made coarser step by step."""

    def __init__(self, roles: Roles) -> None:
        self.roles = roles
        self.position = {node: i for i, node in enumerate(roles.graph.nodes)}
        self.group: dict[Node, int] = {}
        self.members: dict[int, list[Node]] = {}
        self.blocks: set[int] = set()
        self._split()
        self._below = self._count_operations()

    def _split(self) -> None:
        """One group for each operation and all that follows it, up to the next ones."""
        for node in self.roles.graph.nodes:
            if node in self.roles.free or node.op in ('placeholder', 'output'):
                continue
            before = [self.group[n] for n in self.roles.sources(node) if n in self.group]
            new = self.roles.is_operation(node) or not before
            self._add(node, self.position[node] if new else max(before))

    def _add(self, node: Node, key: int) -> None:
        self.group[node] = key
        self.members.setdefault(key, []).append(node)

    def merge(self, keys: Iterable[int]) -> None:
        """Makes one group of several."""
        keys = sorted(set(keys))
        for key in keys[1:]:
            for node in self.members.pop(key):
                self._add(node, keys[0])

    def layers(self, key: int) -> list[Node]:
        """Returns the operations of a group."""
        return [node for node in self.members[key] if self.roles.is_operation(node)]

    # -- blocks ----------------------------------------------------------------------------------------------------

    def merge_regions(self) -> None:
        """Makes one group of each outermost region between a fork and where its paths meet again."""
        regions = [r for node in self.roles.graph.nodes if (r := self._region(node))]
        regions = [r for r in regions if 0 < sum(map(self.roles.is_operation, r)) <= MAX_LAYERS]
        taken: set[Node] = set()
        for region in sorted(regions, key=len, reverse=True):
            if taken.isdisjoint(region):
                taken.update(region)
                self._take(region)

    def _take(self, region: list[Node]) -> None:
        key = self.group[next(node for node in region if self.roles.is_operation(node))]
        # What follows the operations of the region behind its end belongs to it too.
        keys = {self.group[node] for node in region if self.roles.is_operation(node)}
        for node in region:
            if self.group[node] not in keys:
                self.members[self.group[node]].remove(node)
                if not self.members[self.group[node]]:
                    del self.members[self.group[node]]
                self._add(node, key)
        self.merge(keys)
        self.blocks.add(self.group[region[0]])

    def _region(self, fork: Node) -> list[Node] | None:
        """Returns the nodes between a value that is read more than once and the one where all paths from it meet."""
        if fork in self.roles.free or fork.op == 'output' or len(self._readers(fork)) < 2:
            return None
        region: dict[Node, None] = {}
        waiting = {fork: set(self._readers(fork))}
        for node in list(self.roles.graph.nodes)[self.position[fork] + 1 :]:
            sources = [n for n in self._inputs(node) if n is fork or n in region]
            if not sources or node in self.roles.free:
                continue
            if node.op == 'output' or len(sources) < len(set(self._inputs(node))):
                return None
            for source in sources:
                waiting[source].discard(node)
            region[node] = None
            waiting[node] = set(self._readers(node))
            if all(not left for source, left in waiting.items() if source is not node):
                return list(region)
        return None

    def _inputs(self, node: Node) -> list[Node]:
        return list(dict.fromkeys(self.roles.sources(node)))

    def _readers(self, node: Node) -> list[Node]:
        """Returns the nodes that read a value, looking through fake quantizers."""
        readers: dict[Node, None] = {}
        for user in node.users:
            if self.roles.is_quantizer(user):
                readers.update(dict.fromkeys(self._readers(user)))
            elif user not in self.roles.free:
                readers[user] = None
        return list(readers)

    def merge_chains(self) -> None:
        """Makes one group of the few layers in a row that one module has, outside of blocks."""
        chain: list[int] = []
        for key in [*sorted(self.members), None]:
            alone = key is not None and key not in self.blocks
            if chain and not (alone and self._scope(key) == self._scope(chain[0])):
                if len(chain) <= MAX_CHAIN:
                    self.merge(chain)
                chain = []
            if alone:
                chain.append(key)

    def _scope(self, key: int) -> str:
        """Returns the module that a layer is part of: above those that have no layer but this one."""
        operations = self.layers(key)
        if not operations:
            return ''
        path = self.roles.owner(operations[0])
        while path and self._below[path.rpartition('.')[0]] == 1:
            path = path.rpartition('.')[0]
        return path.rpartition('.')[0]

    def _count_operations(self) -> dict[str, int]:
        """Count the operations in each module, by path."""
        counts: dict[str, int] = defaultdict(int)
        for node in filter(self.roles.is_operation, self.group):
            owner = self.roles.owner(node)
            counts[owner] += 1
            while owner:
                owner = owner.rpartition('.')[0]
                counts[owner] += 1
        return counts

    # -- stages, shared weights, order -----------------------------------------------------------------------------

    def merge_stages(self) -> None:
        """Makes one group of neighbours whose layers are children of one module that is not the island itself."""
        stages: dict[str, list[int]] = defaultdict(list)
        for key in sorted(self.members):
            path = common_path([self.roles.owner(node) for node in self.layers(key)])
            stages[path.split('.')[0] or str(key)].append(key)
        for keys in stages.values():
            self.merge(keys)

    def merge_shared(self) -> None:
        """Makes one group of those that use the same weight."""
        users: dict[str, list[Node]] = defaultdict(list)
        for node in self.group:
            quantizer = self.roles.weight_quantizer(node)
            if quantizer is not None:
                users[quantizer].append(node)
        for nodes in users.values():
            self.merge(self.group[node] for node in nodes)

    def merge_open_tuples(self) -> None:
        """Makes one group of those between which something else than a tensor passes."""
        for node in list(self.group):
            for source in self.roles.sources(node):
                if source in self.group and 'shape' not in source.meta:
                    self.merge([self.group[node], self.group[source]])

    def ordered(self) -> list[list[Node]]:
        """Returns the groups in an order in which they can run; those that need each other are one."""
        while True:
            before = {key: self._before(key) for key in self.members}
            order: list[int] = []
            done: set[int] = set()
            while len(order) < len(before):
                ready = [key for key in sorted(before) if key not in done and before[key] <= done]
                if not ready:
                    break
                order.append(ready[0])
                done.add(ready[0])
            if len(order) == len(before):
                return [sorted(self.members[key], key=self.position.__getitem__) for key in order]
            self.merge(_circle({key: before[key] - done for key in before if key not in done}))

    def _before(self, key: int) -> set[int]:
        # What a free node reads, such as a value whose size is asked for, has to be there as well.
        sources = (n for node in _with_free(self.roles, self.members[key]) for n in node.all_input_nodes)
        return {self.group[n] for n in sources if n in self.group} - {key}


def _circle(before: dict[int, set[int]]) -> list[int]:
    """Returns groups that need each other, given those that each one waits for."""
    path = [next(iter(before))]
    while True:
        following = min(before[path[-1]])
        if following in path:
            return path[path.index(following) :]
        path.append(following)


def common_path(paths: list[str]) -> str:
    """Returns the innermost module that contains all of some modules."""
    if not paths:
        return ''
    shared = paths[0].split('.')
    for path in paths[1:]:
        names = path.split('.')
        same = next((i for i, (a, b) in enumerate(zip(shared, names)) if a != b), min(len(shared), len(names)))
        shared = shared[:same]
    return '.'.join(shared)


def _unit(roles: Roles, nodes: list[Node]) -> Unit:
    inside = set(nodes)
    needed = _with_free(roles, nodes)
    order = [node for node in roles.graph.nodes if node in needed]
    inputs = list(dict.fromkeys(n for node in order for n in node.all_input_nodes if n not in needed))
    outputs = [node for node in nodes if any(not _stays(roles, user, inside) for user in node.users)]
    weights = dict.fromkeys(q for n in nodes if (q := roles.weight_quantizer(n)) is not None)
    quantizers = dict.fromkeys(n.target for n in order if roles.is_quantizer(n) and n.target not in weights)
    name = common_path([roles.owner(n) for n in nodes if roles.is_operation(n)])
    function_graph = _function_graph(order, inputs, outputs)
    return Unit(name, tuple(nodes), tuple(inputs), tuple(outputs), tuple(weights), tuple(quantizers), function_graph)


def _stays(roles: Roles, user: Node, inside: set[Node]) -> bool:
    """Tells whether a reader of a value is inside, itself or all that read it."""
    if user in roles.free:
        return all(_stays(roles, next_user, inside) for next_user in user.users)
    return user in inside


def _with_free(roles: Roles, nodes: list[Node]) -> set[Node]:
    """Returns the nodes with all free ones that they need."""
    needed, waiting = set(nodes), list(nodes)
    while waiting:
        for source in waiting.pop().all_input_nodes:
            if source in roles.free and source not in needed:
                needed.add(source)
                waiting.append(source)
    return needed


def _function_graph(order: list[Node], inputs: list[Node], outputs: list[Node]) -> fx.Graph:
    graph = fx.Graph()
    copies = {node: graph.placeholder(f'input_{i}') for i, node in enumerate(inputs)}
    for node in order:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[node] for node in outputs))
    graph.lint()
    return graph


__all__ = ['GRANULARITIES', 'Unit', 'common_path', 'find_units']
