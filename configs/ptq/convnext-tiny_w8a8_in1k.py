# ConvNeXt-T: 8-bit weights and activations, quantized after training.
_base_ = [
    'mmcls::convnext/convnext-tiny_32xb128_in1k.py',
    '../_base_/qconfigs/w8a8_mse.py',
]

model = dict(
    _delete_=True,
    type='mmrazor.GeneralQuant',
    architecture=_base_.model,
    quantizer=dict(type='mmrazor.CustomQuantizer', qconfig=_base_.qconfig),
    float_checkpoint='https://download.openmmlab.com/mmclassification/v0/'
    'convnext/convnext-tiny_32xb128-noema_in1k_20221208-5d4509c7.pth',
)
test_cfg = dict(type='mmrazor.PTQLoop', calibrate_steps=8)
# The moving average of the weights is a matter of training from scratch.
custom_hooks = []
