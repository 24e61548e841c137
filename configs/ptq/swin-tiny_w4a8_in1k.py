# Swin-T: 4-bit weights, 8-bit activations, quantized after training.
_base_ = [
    'mmcls::swin_transformer/swin-tiny_16xb64_in1k.py',
    '../_base_/qconfigs/w4a8_mse.py',
]

model = dict(
    _delete_=True,
    type='mmrazor.GeneralQuant',
    architecture=_base_.model,
    quantizer=dict(type='mmrazor.CustomQuantizer', qconfig=_base_.qconfig),
    float_checkpoint='https://download.openmmlab.com/mmclassification/v0/'
    'swin-transformer/swin_tiny_224_b16x64_300e_imagenet_20210616_090925-66df6be6.pth',
)
test_cfg = dict(type='mmrazor.PTQLoop', calibrate_steps=16)
