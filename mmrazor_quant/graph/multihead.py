"""Taking ``nn.MultiheadAttention`` apart, so that its projections and its two matrix products can be quantized."""

from __future__ import annotations

import copy
import operator

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx import Node

from .decompose import scale_query

_ARGUMENTS = ('query', 'key', 'value', 'key_padding_mask', 'need_weights', 'attn_mask', 'average_attn_weights')


def decompose_multihead(graph: fx.Graph, root: nn.Module) -> fx.Graph:
    """Returns a copy of a graph with every multi-head attention written as projections and matrix products.

    Equal to the module up to float rounding. Modules with ``bias_k``, ``bias_v`` or ``add_zero_attn``, and calls on
    unbatched inputs, stay as they are.

    Args:
        graph: captured graph; not changed.
        root: the island's module.
    """
    graph = copy.deepcopy(graph)
    for node in list(graph.nodes):
        if node.op == 'call_module' and _can_decompose(node, root.get_submodule(node.target)):
            with graph.inserting_before(node):
                _Attention(graph, root, node).replace()
    return graph


def _can_decompose(node: Node, module: nn.Module) -> bool:
    if type(module) is not nn.MultiheadAttention or module.bias_k is not None or module.add_zero_attn:
        return False
    only_items = all(user.target is operator.getitem for user in node.users)
    return only_items and len(_arguments(node)['query'].meta['shape']) == 3


def _arguments(node: Node) -> dict:
    return dict(zip(_ARGUMENTS, node.args)) | dict(node.kwargs)


class _Attention:
    """The nodes of one call."""

    def __init__(self, graph: fx.Graph, root: nn.Module, node: Node) -> None:
        self.graph, self.root, self.node = graph, root, node
        self.module = root.get_submodule(node.target)
        self.arguments = _arguments(node)

    def replace(self) -> None:
        """Puts the new nodes in place of the call."""
        output, weights = self._attend()
        for user in list(self.node.users):
            new = output if user.args[1] == 0 else self._returned_weights(weights)
            new.meta = dict(user.meta)
            user.replace_all_uses_with(new)
            self.graph.erase_node(user)
        self.graph.erase_node(self.node)

    def _attend(self) -> tuple[Node, Node]:
        heads, sequence_first = self.module.num_heads, not self.module.batch_first
        query, key, value = (self._split(x, heads, sequence_first) for x in self._project())
        batch, _, length, features = query.meta['shape']
        keys = key.meta['shape'][2]
        shape = (batch, heads, length, keys)
        scores = self._call(
            torch.matmul,
            self._call(scale_query, query, None, shape=query.meta['shape']),
            self._call(torch.transpose, key, -2, -1, shape=(batch, heads, features, keys)),
            shape=shape,
        )
        masks = (self.arguments.get('attn_mask'), self.arguments.get('key_padding_mask'))
        if any(mask is not None for mask in masks):
            scores = self._call(hide_masked, scores, *masks, shape=shape)
        weights = self._call(torch.softmax, scores, -1, shape=shape)
        if self.module.dropout:
            weights = self._call(drop_weights, weights, self._attribute(''), shape=shape)
        output = self._call(torch.matmul, weights, value, shape=query.meta['shape'])
        full = (length, batch, heads * features) if sequence_first else (batch, length, heads * features)
        merged = self._call(merge_heads, output, sequence_first, shape=full)
        parameters = self._attribute('out_proj.weight'), self._attribute('out_proj.bias')
        return self._call(F.linear, merged, *parameters, shape=full), weights

    def _split(self, x: Node, heads: int, sequence_first: bool) -> Node:
        first, second, channels = x.meta['shape']
        batch, length = (second, first) if sequence_first else (first, second)
        return self._call(split_heads, x, heads, sequence_first, shape=(batch, heads, length, channels // heads))

    def _project(self) -> list[Node]:
        inputs = [self.arguments[name] for name in ('query', 'key', 'value')]
        shapes = [(*x.meta['shape'][:2], self.module.embed_dim) for x in inputs]
        bias = self._attribute('in_proj_bias')
        size = self.module.embed_dim
        rows = [(i * size, (i + 1) * size) for i in range(3)]
        if not self.module._qkv_same_embed_dim:
            weights = [self._attribute(f'{name}_proj_weight') for name in 'qkv']
            biases = [None if bias is None else self._call(take_rows, bias, *row, shape=(size,)) for row in rows]
            each = zip(inputs, weights, biases, shapes)
            return [self._call(F.linear, x, weight, b, shape=shape) for x, weight, b, shape in each]
        weight = self._attribute('in_proj_weight')
        each = zip(inputs, rows, shapes)
        return [self._call(linear_rows, x, weight, bias, *row, shape=shape) for x, row, shape in each]

    def _returned_weights(self, weights: Node) -> Node:
        average, shape = self.arguments.get('average_attn_weights', True), weights.meta['shape']
        if not average:
            return self._call(torch.clone, weights, shape=shape)
        return self._call(torch.mean, weights, 1, shape=(shape[0], *shape[2:]))

    def _attribute(self, name: str) -> Node | None:
        """Returns a node that reads a parameter of the module, or the module itself; None for one that it has not."""
        path = f'{self.node.target}.{name}'.rstrip('.')
        value = operator.attrgetter(path)(self.root)
        if value is None:
            return None
        node = self.graph.get_attr(path)
        if isinstance(value, Tensor):
            node.meta['shape'] = tuple(value.shape)
        return node

    def _call(self, function: object, *args: object, shape: tuple[int, ...]) -> Node:
        node = self.graph.call_function(function, args)
        node.meta = {k: v for k, v in self.node.meta.items() if k == 'nn_module_stack'} | {'shape': shape}
        return node


def linear_rows(x: Tensor, weight: Tensor, bias: Tensor | None, start: int, stop: int) -> Tensor:
    """Applies the rows ``start`` to ``stop`` of a packed projection, weight (rows, in) and bias (rows,), to ``x``."""
    return F.linear(x, weight[start:stop], None if bias is None else bias[start:stop])


def take_rows(tensor: Tensor, start: int, stop: int) -> Tensor:
    """Returns ``tensor[start:stop]``."""
    return tensor[start:stop]


def split_heads(x: Tensor, heads: int, sequence_first: bool) -> Tensor:
    """Turns (batch, length, channels), or (length, batch, channels), into (batch, heads, length, channels / heads)."""
    if sequence_first:
        x = x.transpose(0, 1)
    return x.reshape(x.shape[0], x.shape[1], heads, -1).transpose(1, 2)


def merge_heads(x: Tensor, sequence_first: bool) -> Tensor:
    """Undoes :func:`split_heads`."""
    x = x.transpose(1, 2).flatten(2)
    return x.transpose(0, 1) if sequence_first else x


def hide_masked(scores: Tensor, mask: Tensor | None, padding: Tensor | None) -> Tensor:
    """Applies the masks of ``nn.MultiheadAttention``.

    Args:
        scores: shape (batch, heads, queries, keys).
        mask: shape (queries, keys) or (batch * heads, queries, keys); bool (True is hidden) or additive.
        padding: shape (batch, keys); bool (True is hidden) or additive.
    """
    if mask is not None:
        mask = mask.reshape(scores.shape) if mask.dim() == 3 else mask
        scores = _hide(scores, mask)
    return scores if padding is None else _hide(scores, padding[:, None, None, :])


def _hide(scores: Tensor, mask: Tensor) -> Tensor:
    return scores.masked_fill(mask, float('-inf')) if mask.dtype == torch.bool else scores + mask


def drop_weights(weights: Tensor, module: nn.Module) -> Tensor:
    """Applies the dropout of an ``nn.MultiheadAttention`` to its attention weights while it is in training."""
    return F.dropout(weights, module.dropout, module.training)
