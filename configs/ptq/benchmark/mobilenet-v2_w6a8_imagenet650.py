# MobileNetV2: 6-bit weights, 8-bit activations, full ranges.
_base_ = './mobilenet-v2_w8a8_imagenet650.py'

model = dict(quantizer=dict(qconfig=dict(w_qscheme=dict(bit=6))))
