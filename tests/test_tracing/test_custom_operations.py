"""Operations of mmcv inside islands: kept as they are, with their gradients, and reported."""

from __future__ import annotations

import copy

import torch
from mmcv.ops import (
    ModulatedDeformConv2dPack,
    MultiScaleDeformableAttention,
    modulated_deform_conv,
    multi_scale_deform_attn,
)
from torch import nn

from mmrazor_quant.tracing import CustomTracer, find_islands
from mmrazor_quant.tracing.report import CaptureReport

IMAGES = torch.linspace(-2, 3, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8)


class Deformable(nn.Module):
    def __init__(self):
        super().__init__()
        self.before, self.after = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)
        self.middle = ModulatedDeformConv2dPack(4, 4, 3, padding=1)
        nn.init.normal_(self.middle.conv_offset.weight, std=0.1)

    def forward(self, x):
        return self.after(self.middle(self.before(x)))


class Attending(nn.Module):
    """Deformable attention over one level, whose size comes as a tensor."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Conv2d(3, 8, 1)
        self.attention = MultiScaleDeformableAttention(8, num_heads=2, num_levels=1, dropout=0.0, batch_first=True)

    def forward(self, x, spatial_shapes):
        queries = self.embed(x).flatten(2).transpose(1, 2)
        points = torch.linspace(0, 1, queries.shape[1]).reshape(1, -1, 1, 1).expand(len(x), -1, 1, 2)
        start = spatial_shapes.new_zeros(1)
        return self.attention(
            queries, value=queries, reference_points=points, spatial_shapes=spatial_shapes, level_start_index=start
        )


def captured(model, *inputs):
    def run():
        for training in (False, True):
            model.train(training)
            model(*inputs)

    findings = find_islands(model, [run], CustomTracer())
    for path, island in findings.islands.items():
        island.install(model.get_submodule(path))
    return findings


def gradients(model, *inputs):
    model.train().zero_grad()
    model(*inputs).square().sum().backward()
    return [parameter.grad for parameter in model.parameters()]


def assert_alike(model, reference, *inputs):
    assert torch.equal(model(*inputs), reference(*inputs))
    assert all(torch.equal(a, b) for a, b in zip(gradients(model, *inputs), gradients(reference, *inputs), strict=True))


def test_deformable_convolution_is_one_call_with_its_own_gradient():
    model = Deformable()
    reference = copy.deepcopy(model)

    findings = captured(model, IMAGES)

    report = CaptureReport.of(model, findings)
    assert list(findings.islands) == [''] and report.outside == {}
    assert report.custom_ops == {'middle': 'ModulatedDeformConv2dFunction'}
    assert 'custom operation, stays float: middle (ModulatedDeformConv2dFunction)' in report.table()
    assert_alike(model, reference, IMAGES)


def test_deformable_attention_is_one_call_and_its_assertion_stays():
    model = Attending().eval()
    sizes = torch.tensor([[8, 8]])
    reference = copy.deepcopy(model)

    findings = captured(model, IMAGES, sizes)

    report = CaptureReport.of(model, findings)
    assert list(findings.islands) == [''] and report.outside == {}
    assert report.custom_ops == {'attention': 'multi_scale_deformable_attn_pytorch'}
    assert_alike(model, reference, IMAGES, sizes)


def test_what_a_trace_replaces_in_mmcv_is_put_back():
    before = (
        modulated_deform_conv.modulated_deform_conv2d,
        multi_scale_deform_attn.multi_scale_deformable_attn_pytorch,
    )

    captured(Deformable(), IMAGES)

    assert before == (
        modulated_deform_conv.modulated_deform_conv2d,
        multi_scale_deform_attn.multi_scale_deformable_attn_pytorch,
    )
