# MobileNetV3-small: 8-bit weights and activations, quantized after training.
_base_ = [
    'mmcls::mobilenet_v3/mobilenet-v3-small_8xb128_in1k.py',
    '../_base_/qconfigs/w8a8_minmax.py',
]

model = dict(
    _delete_=True,
    type='mmrazor.GeneralQuant',
    architecture=_base_.model,
    quantizer=dict(type='mmrazor.CustomQuantizer', qconfig=_base_.qconfig),
    float_checkpoint='https://download.openmmlab.com/mmclassification/v0/'
    'mobilenet_v3/mobilenet-v3-small_8xb128_in1k_20221114-bd1bfcde.pth',
)
test_cfg = dict(type='mmrazor.PTQLoop', calibrate_steps=8)
