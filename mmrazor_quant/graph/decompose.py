"""Taking fused attention apart, so that its two matrix products can be quantized."""

from __future__ import annotations

import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.fx import Node

_ARGUMENTS = ('query', 'key', 'value', 'attn_mask', 'dropout_p', 'is_causal')


def decompose_attention(graph: fx.Graph) -> fx.Graph:
    """Returns a copy of a graph with every scaled dot-product attention written as matmul, softmax, matmul.

    Equal to the fused function up to float rounding.

    Args:
        graph: captured graph; not changed.
    """
    graph = copy.deepcopy(graph)
    for node in list(graph.nodes):
        if node.op == 'call_function' and node.target is F.scaled_dot_product_attention:
            with graph.inserting_before(node):
                node.replace_all_uses_with(_attention(graph, node))
            graph.erase_node(node)
    return graph


def _attention(graph: fx.Graph, node: Node) -> Node:
    arguments = dict(zip(_ARGUMENTS, node.args)) | dict(node.kwargs)
    query, key, value = (arguments[name] for name in ('query', 'key', 'value'))

    def call(function: object, *args: object, shape: tuple[int, ...], **kwargs: object) -> Node:
        new = graph.call_function(function, args, kwargs)
        new.meta = {k: v for k, v in node.meta.items() if k == 'nn_module_stack'} | {'shape': shape}
        return new

    (*outer, length, features), keys = query.meta['shape'], key.meta['shape'][-2]
    if arguments.get('enable_gqa', False):
        key, value = (
            call(repeat_heads, tensor, query, shape=(*outer, *tensor.meta['shape'][-2:])) for tensor in (key, value)
        )
    query = call(scale_query, query, arguments.get('scale'), shape=query.meta['shape'])
    transposed = call(torch.transpose, key, -2, -1, shape=(*key.meta['shape'][:-2], features, keys))
    shape = (*outer, length, keys)
    scores = call(torch.matmul, query, transposed, shape=shape)
    masked = arguments.get('attn_mask') is not None or arguments.get('is_causal', False)
    if masked:
        scores = call(mask_scores, scores, arguments.get('attn_mask'), arguments.get('is_causal', False), shape=shape)
    weights = call(masked_softmax if masked else torch.softmax, scores, -1, shape=shape)
    if arguments.get('dropout_p', 0.0):
        weights = call(F.dropout, weights, arguments['dropout_p'], True, shape=shape)
    return call(torch.matmul, weights, value, shape=node.meta.get('shape', ()))


def repeat_heads(tensor: Tensor, query: Tensor) -> Tensor:
    """Repeats the heads, dimension -3, of a key or value for the groups of queries that share them."""
    return tensor.repeat_interleave(query.shape[-3] // tensor.shape[-3], dim=-3)


def scale_query(query: Tensor, scale: float | None) -> Tensor:
    """Multiplies the query by ``scale``, or by 1 / sqrt(its last dimension)."""
    return query * (1.0 / math.sqrt(query.shape[-1]) if scale is None else scale)


def mask_scores(scores: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """Applies the mask of :func:`torch.nn.functional.scaled_dot_product_attention`.

    Args:
        scores: shape (..., queries, keys).
        mask: bool (True takes part) or additive float, broadcastable to ``scores``.
        causal: whether query i sees keys 0..i only.
    """
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask.dtype == torch.bool:
        return scores.masked_fill(~mask, float('-inf'))
    return scores + mask


def masked_softmax(scores: Tensor, dim: int) -> Tensor:
    """Returns the softmax over ``dim``, zeros where every score is masked, as the fused attention does."""
    nothing = (scores == float('-inf')).all(dim, keepdim=True)
    return torch.softmax(scores, dim).masked_fill(nothing, 0.0)
