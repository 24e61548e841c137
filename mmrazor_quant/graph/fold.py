"""Folding batch norms into the layer before them."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Collection

import torch
from torch import fx, nn
from torch.fx import Node

from .layers import BATCH_NORM_TYPES, LAYER_TYPES, folded_bias, folded_weight, is_linear_in_weight

_NORM_FORWARDS = (nn.BatchNorm1d.forward, nn.SyncBatchNorm.forward)
"""A batch norm with a forward of its own may compute anything."""


def find_foldable(graphs: list[fx.Graph], root: nn.Module) -> dict[str, str]:
    """Returns the pairs (layer path, batch norm path) that can be one operation in all graphs of an island.

    A pair qualifies where each call of the layer is followed by that batch norm and by nothing else, and the batch
    norm follows nothing else. A layer shared by several batch norms is left as it is: it has one weight, which no
    single norm can be folded into; so is one whose weight or bias is also read elsewhere.

    Args:
        graphs: captured graphs of one island.
        root: the island's module.
    """
    followers: dict[str, set[str | None]] = defaultdict(set)
    leaders: dict[str, set[str | None]] = defaultdict(set)
    for graph in graphs:
        for node in graph.nodes:
            if _is(node, root, LAYER_TYPES):
                followers[node.target].add(_follower(node, root))
            elif _is(node, root, BATCH_NORM_TYPES):
                leaders[node.target].add(_leader(node, root))
    read = {node.target for graph in graphs for node in graph.nodes if node.op == 'get_attr'}
    pairs = {layer: next(iter(norms)) for layer, norms in followers.items() if len(norms) == 1}
    return {
        layer: norm
        for layer, norm in pairs.items()
        if norm is not None
        and leaders[norm] == {layer}
        and not {f'{layer}.weight', f'{layer}.bias'} & read
        and _foldable(root, layer, norm)
    }


def fold(graph: fx.Graph, root: nn.Module, pairs: dict[str, str]) -> fx.Graph:
    """Returns a copy of a graph without the folded batch norms; the layer's node names its norm in its metadata.

    Args:
        graph: captured graph; not changed.
        root: the island's module.
        pairs: what :func:`find_foldable` returned.
    """
    graph = copy.deepcopy(graph)
    for node in list(graph.nodes):
        if node.op == 'call_module' and node.target in pairs and _follower(node, root) == pairs[node.target]:
            norm = next(iter(node.users))
            norm.replace_all_uses_with(node)
            node.meta['folded_norm'] = norm.target
            graph.erase_node(norm)
    return graph


@torch.no_grad()
def bake_norms(graphs: list[fx.Graph], root: nn.Module, kept: Collection[nn.Module]) -> None:
    """Puts the batch norms that can be folded into the weights of the layers before them, for evaluation.

    Args:
        graphs: all graphs of an island, which stay as they are: a norm becomes an identity.
        root: the island's module; changed in place.
        kept: modules that are left alone.
    """
    for layer_path, norm_path in find_foldable(graphs, root).items():
        layer, norm = root.get_submodule(layer_path), root.get_submodule(norm_path)
        if layer in kept or norm in kept:
            continue
        weight, bias = folded_weight(layer, norm), folded_bias(layer, norm)
        layer.weight, layer.bias = nn.Parameter(weight), nn.Parameter(bias)
        parent, _, name = norm_path.rpartition('.')
        root.get_submodule(parent)._modules[name] = nn.Identity()


def _is(node: Node, root: nn.Module, types: tuple[type, ...]) -> bool:
    return node.op == 'call_module' and isinstance(root.get_submodule(node.target), types)


def _follower(node: Node, root: nn.Module) -> str | None:
    """Returns the path of the batch norm that is the only one to read a layer's output, channel by channel."""
    users = list(node.users)
    if len(users) != 1 or not _is(users[0], root, BATCH_NORM_TYPES) or not _over_channels(node, root):
        return None
    return users[0].target


def _over_channels(node: Node, root: nn.Module) -> bool:
    """Tells whether dimension 1, over which batch norms go, is the layer's output channels."""
    return not isinstance(root.get_submodule(node.target), nn.Linear) or len(node.meta['shape']) == 2


def _leader(node: Node, root: nn.Module) -> str | None:
    source = node.all_input_nodes[0]
    return source.target if _is(source, root, LAYER_TYPES) else None


def _foldable(root: nn.Module, layer_path: str, norm_path: str) -> bool:
    layer, norm = root.get_submodule(layer_path), root.get_submodule(norm_path)
    grouped_transposed = isinstance(layer, nn.modules.conv._ConvTransposeNd) and layer.groups > 1
    plain_norm = norm.track_running_stats and type(norm).forward in _NORM_FORWARDS
    return plain_norm and not grouped_transposed and is_linear_in_weight(layer)
