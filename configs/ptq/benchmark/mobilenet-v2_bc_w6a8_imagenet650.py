# MobileNetV2: 6-bit weights, 8-bit activations, full ranges, mean outputs of the layers corrected.
_base_ = './mobilenet-v2_w6a8_imagenet650.py'

test_cfg = dict(extra_steps=[dict(type='mmrazor.BiasCorrection')])
