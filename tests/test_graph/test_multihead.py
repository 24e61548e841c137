"""Multi-head attention taken apart."""

import pytest
import torch
from torch import nn

from mmrazor_quant.algorithms import GeneralQuant

EMBED = 16


class Attention(nn.Module):
    def __init__(self, cross=False, **kwargs):
        super().__init__()
        self.attn = nn.MultiheadAttention(EMBED, 4, **kwargs)
        self.memory = nn.Linear(EMBED, kwargs.get('kdim') or EMBED) if cross else None

    def forward(self, x, mask=None, padding=None):
        other = x if self.memory is None else self.memory(x)
        out, weights = self.attn(x, other, other, attn_mask=mask, key_padding_mask=padding)
        return out, weights


class Outer(nn.Module):
    def __init__(self, mask, padding, **kwargs):
        super().__init__()
        self.inner = Attention(**kwargs)
        self.mask, self.padding = mask, padding

    def forward(self, x):
        return self.inner(x, self.mask, self.padding)


CASES = {
    'self': {},
    'batch first': dict(batch_first=True),
    'no bias': dict(bias=False),
    'cross': dict(cross=True),
    'other key size': dict(cross=True, kdim=8, vdim=8),
    'causal': dict(batch_first=True, mask=torch.ones(6, 6).triu(1).bool()),
    'additive mask': dict(batch_first=True, mask=torch.randn(6, 6)),
    'padding': dict(batch_first=True, padding=torch.tensor([[False] * 6, [False] * 4 + [True] * 2])),
}


@pytest.mark.parametrize('case', CASES)
def test_multihead_attention_is_quantized(case):
    kwargs = dict(CASES[case])
    torch.manual_seed(0)
    module = Outer(kwargs.pop('mask', None), kwargs.pop('padding', None), **kwargs).eval()
    shape = (2, 6, EMBED) if kwargs.get('batch_first') else (6, 2, EMBED)
    x = torch.randn(shape)
    expected = module(x)
    scheme = dict(bit=16, is_symmetry=True, is_per_channel=False)
    model = GeneralQuant(module, dict(type='mmrazor.CustomQuantizer', qconfig=dict(a_qscheme=scheme, w_qscheme=scheme)),
                         input_shape=shape[1:])  # fmt: skip
    model.eval()

    model.observe_weights()
    model.set_quant_state(act_observer=True)
    with torch.no_grad():
        taken_apart = model(x)
    model.compute_act_qparams()
    model.set_quant_state(False, True, False, True)
    with torch.no_grad():
        quantized = model(x)

    torch.testing.assert_close(taken_apart, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(quantized, expected, rtol=0, atol=2e-3)
    assert not torch.equal(quantized[0], taken_apart[0])
    weights = {site.weight for site in model.inserted.weights}
    assert 'inner.attn.out_proj.weight' in weights
    assert any('in_proj_weight' in w or 'q_proj_weight' in w for w in weights)
    assert sum('matmul' in path for path in model.inserted.activations) == 4
    model.mark_calibrated()
    with torch.no_grad():
        torch.testing.assert_close(model.convert()(x), quantized, rtol=1e-5, atol=1e-6)
