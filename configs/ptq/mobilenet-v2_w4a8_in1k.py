# MobileNetV2: 4-bit weights, 8-bit activations, quantized after training.
_base_ = [
    'mmcls::mobilenet_v2/mobilenet-v2_8xb32_in1k.py',
    '../_base_/qconfigs/w4a8_mse.py',
]

model = dict(
    _delete_=True,
    type='mmrazor.GeneralQuant',
    architecture=_base_.model,
    quantizer=dict(type='mmrazor.CustomQuantizer', qconfig=_base_.qconfig),
    float_checkpoint='https://download.openmmlab.com/mmclassification/v0/'
    'mobilenet_v2/mobilenet_v2_batch256_imagenet_20200708-3b2dc3af.pth',
)
test_cfg = dict(type='mmrazor.PTQLoop', calibrate_steps=32)
