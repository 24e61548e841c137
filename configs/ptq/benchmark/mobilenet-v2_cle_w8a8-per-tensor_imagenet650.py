# MobileNetV2 with one scale for all output channels of a layer, their ranges made equal before.
_base_ = './mobilenet-v2_w8a8-per-tensor_imagenet650.py'

test_cfg = dict(extra_steps=[dict(type='mmrazor.CrossLayerEqualization')])
