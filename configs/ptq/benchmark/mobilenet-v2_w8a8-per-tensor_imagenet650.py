# MobileNetV2 with one scale for all output channels of a layer, which depthwise convolutions do not take well.
_base_ = './mobilenet-v2_w8a8_imagenet650.py'

model = dict(quantizer=dict(qconfig=dict(w_qscheme=dict(is_per_channel=False))))
