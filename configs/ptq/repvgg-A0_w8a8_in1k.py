# RepVGG-A0, with its training branches: 8-bit weights and activations, quantized after training.
_base_ = [
    'mmcls::repvgg/repvgg-A0_8xb32_in1k.py',
    '../_base_/qconfigs/w8a8_minmax.py',
]

model = dict(
    _delete_=True,
    type='mmrazor.GeneralQuant',
    architecture=_base_.model,
    quantizer=dict(type='mmrazor.CustomQuantizer', qconfig=_base_.qconfig),
    float_checkpoint='https://download.openmmlab.com/mmclassification/v0/'
    'repvgg/repvgg-A0_8xb32_in1k_20221213-60ae8e23.pth',
)
test_cfg = dict(type='mmrazor.PTQLoop', calibrate_steps=32)
