"""Addition, activation and quantization at once: the operations one by one, to the last bit."""

from __future__ import annotations

import math

import pytest
import torch

from mmrazor_quant import ops
from mmrazor_quant.ops import activated

ENDS = {'relu': (0.0, math.inf), 'relu6': (0.0, 6.0), 'none': (-math.inf, math.inf)}
FIXED = ops.Quantization(torch.tensor([0.013]), torch.tensor([40], dtype=torch.int32), 0, 255)
POWER_OF_TWO = ops.Quantization(torch.tensor([0.23]), torch.tensor([0]), -8, 7, 0.5, is_pot_scale=True)


def tensor(memory_format: torch.memory_format = torch.contiguous_format, **kwargs) -> torch.Tensor:
    x = 4 * torch.randn(4, 8, 40, 40, **kwargs)
    x.view(-1)[5] = float('nan')
    return x.to(memory_format=memory_format)


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('quantization', [FIXED, POWER_OF_TWO], ids=['fixed', 'power of two'])
@pytest.mark.parametrize('ends', ENDS)
@pytest.mark.parametrize('has_plain', [False, True])
@pytest.mark.parametrize('has_other', [False, True])
@torch.no_grad()
def test_equal_to_one_by_one(compile_at_once, has_other, has_plain, ends, quantization, memory_format):
    torch.manual_seed(0)
    x = tensor(memory_format)
    other = tensor(memory_format) if has_other else None
    before = x.clone()
    assert activated.usable(x, other, quantization)

    found, plain = ops.fake_quantize_activated(x, other, ENDS[ends], quantization, has_plain)

    with ops.eager_mode():
        expected = torch.clamp(x if other is None else x + other, *ENDS[ends])
        scale = ops.effective_scale(quantization.scale, quantization.is_pot_scale)
        bounds = quantization.quant_min, quantization.quant_max
        quantized = ops.fake_quantize(expected, scale, quantization.zero_point, *bounds)
    torch.testing.assert_close(found, quantized, rtol=0, atol=0, equal_nan=True)
    assert found.stride() == x.stride() and torch.equal(x.nan_to_num(), before.nan_to_num())
    if has_plain:
        torch.testing.assert_close(plain, expected, rtol=0, atol=0, equal_nan=True)
    else:
        assert plain is None


X = torch.zeros(4, 8, 40, 40)
OTHERS = {
    'small': (torch.zeros(1, 2, 3, 3), None, FIXED),
    'half': (X.bfloat16(), None, FIXED),
    'holes': (torch.zeros(4, 8, 40, 80)[..., ::2], None, FIXED),
    'other strides': (X, X.to(memory_format=torch.channels_last), FIXED),
    'broadcast': (X, torch.zeros(8, 1, 1), FIXED),
    'wide': (X, None, ops.Quantization(torch.ones(1), torch.zeros(1), 0, 2**25)),
    'per channel': (X, None, ops.Quantization(torch.ones(8), torch.zeros(8), 0, 15)),
    'observed': (X, None, ops.Quantization(torch.ones(1), torch.zeros(1), 0, 15, from_range=max)),
}  # fmt: skip


@pytest.mark.parametrize('name', OTHERS)
@torch.no_grad()
def test_left_to_the_operations(compile_at_once, name):
    assert not activated.usable(*OTHERS[name])


def test_not_with_gradients(compile_at_once):
    assert not activated.usable(X, None, FIXED)
