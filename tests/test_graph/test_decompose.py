"""Fused attention taken apart computes the same, with two matrix products to quantize."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from small_models import Net, calibrate, error, images, names, quantized
from torch import nn

from mmrazor_quant.graph.decompose import decompose_attention, mask_scores, scale_query
from mmrazor_quant.tracing import CustomTracer
from mmrazor_quant.tracing.code import compile_graph


def heads(queries=5, keys=5, size=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 3, n, size, generator=generator).double() for n in (queries, keys, keys)]


BOOL = torch.rand(5, 7, generator=torch.Generator().manual_seed(1)) > 0.4
BOOL[:, 0] = True

ARGUMENTS = {
    'plain': dict(),
    'scale': dict(scale=0.3),
    'causal': dict(is_causal=True),
    'bool mask': dict(attn_mask=BOOL),
    'float mask': dict(attn_mask=torch.randn(5, 7).double()),
    'mask per head': dict(attn_mask=torch.randn(2, 3, 5, 7).double(), scale=2.0),
    'no dropout': dict(dropout_p=0.0),
}


def decomposed(forward, *inputs, training=False):
    module = Net(lambda m, qkv: forward(m, *qkv))
    module.train(training)
    graph = CustomTracer().capture(module, (inputs,), {})
    new = decompose_attention(graph)
    assert [n.target for n in graph.nodes].count(F.scaled_dot_product_attention) > 0
    assert F.scaled_dot_product_attention not in [n.target for n in new.nodes]
    assert [n.target for n in new.nodes].count(torch.matmul) == 2
    return compile_graph(new), module


@pytest.mark.parametrize('name', ARGUMENTS)
def test_equal_to_the_fused_function(name):
    arguments = {key: value for key, value in ARGUMENTS[name].items() if key != 'attn_mask'}
    mask = ARGUMENTS[name].get('attn_mask')
    masks = [] if mask is None else [mask]

    function, module = decomposed(
        lambda m, q, k, v, *mask: F.scaled_dot_product_attention(q, k, v, *mask, **arguments), *heads(5, 7), *masks
    )

    for values in ([*heads(5, 7), *masks], [*heads(5, 7, seed=3), *masks]):
        assert torch.allclose(function(module, *values), module(values), rtol=1e-10)


def test_a_traced_mask():
    inputs = heads(5, 5)

    function, module = decomposed(
        lambda m, q, k, v: F.scaled_dot_product_attention(q, k, v, q.mean(-1, keepdim=True) > k[..., :1].mT), *inputs
    )

    for values in (inputs, heads(5, 5, seed=2)):
        assert torch.allclose(function(module, *values), module(values), rtol=1e-10)


@pytest.mark.parametrize('mask', [torch.eye(5) < 1, torch.where(torch.eye(5) < 1, 0.0, float('-inf')).double()])
def test_rows_that_are_masked_out_entirely(mask):
    mask[1] = False if mask.dtype == torch.bool else float('-inf')
    inputs = [*heads(), mask]

    function, module = decomposed(lambda m, q, k, v, mask: F.scaled_dot_product_attention(q, k, v, mask), *inputs)

    found = function(module, *inputs)
    assert torch.allclose(found, module(inputs), rtol=1e-10)
    assert found[:, :, 1].abs().max() == 0


def test_dropout_only_while_training():
    def forward(module, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, dropout_p=0.5 if module.training else 0.0)

    inputs = heads()

    function, module = decomposed(forward, *inputs, training=True)
    assert not torch.equal(function(module, *inputs), function(module, *inputs))
    values = torch.ones_like(inputs[2])
    mean = torch.stack([function(module, *inputs[:2], values) for _ in range(400)]).mean()
    assert abs(mean.item() - 1) < 0.05
    function, module = decomposed(forward, *inputs)
    assert torch.equal(function(module, *inputs), function(module, *inputs))


def test_other_sizes_than_the_example():
    function, module = decomposed(lambda m, q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), *heads())

    larger = heads(9, 9, seed=2)

    assert torch.allclose(function(module, *larger), module(larger), rtol=1e-10)


def test_gradients():
    function, module = decomposed(lambda m, q, k, v: F.scaled_dot_product_attention(q, k, v), *heads())
    grads = []
    for run in (lambda *v: function(module, *v), lambda *v: module(v)):
        values = [t.clone().requires_grad_() for t in heads()]
        run(*values).square().sum().backward()
        grads.append([t.grad for t in values])

    assert all(torch.allclose(a, b, rtol=1e-8) for a, b in zip(*grads))


def test_grouped_queries():
    query, key, value = heads()
    inputs = [query.repeat(1, 2, 1, 1), key, value]

    function, module = decomposed(lambda m, q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True), *inputs)

    assert torch.allclose(function(module, *inputs), module(inputs), rtol=1e-10)


def test_helpers():
    scores = torch.zeros(2, 3)
    assert mask_scores(scores, torch.tensor([True, False, True]), False)[0].tolist() == [0, float('-inf'), 0]
    assert mask_scores(scores, torch.tensor([1.0, 2.0, 3.0]), False)[1].tolist() == [1, 2, 3]
    assert mask_scores(scores, None, True).isinf().tolist() == [[False, True, True], [False, False, True]]
    assert torch.equal(scale_query(torch.ones(1, 4), None), torch.full((1, 4), 0.5))
    assert torch.equal(scale_query(torch.ones(1, 4), 3.0), torch.full((1, 4), 3.0))


class Attention(nn.Module):
    """Self-attention of a vision transformer."""

    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x):
        x = x.flatten(1, 2)
        qkv = self.qkv(x).reshape(x.shape[0], x.shape[1], 3, 2, 4).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(*qkv, dropout_p=0.1 if self.training else 0.0)
        return self.proj(x.transpose(1, 2).reshape(x.shape[0], -1, 8))


def test_the_matrix_products_of_attention_are_quantized():
    reference = Net(lambda m, x: m.attention(x), attention=Attention()).eval()

    model = quantized(copy.deepcopy(reference))

    assert names(model.act_quantizers()) == [
        'attention.qkv.input_fake_quant',
        'attention.matmul_input0_fake_quant',
        'attention.matmul_input1_fake_quant',
        'attention.matmul_input0_1_fake_quant',
        'attention.matmul_input1_1_fake_quant',
        'attention.proj.input_fake_quant',
    ]
    assert error(model(images()), reference(images())) < 1e-5
    calibrate(model)
    assert 1e-7 < error(model(images()), reference(images())) < 1e-3
