# MobileNetV2: 6-bit weights with the ranges that make the least error of a layer's output, 8-bit activations.
_base_ = './mobilenet-v2_w6a8_imagenet650.py'

test_cfg = dict(extra_steps=[dict(type='mmrazor.WeightRangeMSE')])
