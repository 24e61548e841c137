# YOLOX-nano: 8-bit weights and activations, quantized after training.
_base_ = [
    'mmdet::yolox/yolox_nano_8xb8-300e_coco.py',
    '../_base_/qconfigs/w8a8_minmax.py',
]

model = dict(
    _delete_=True,
    type='mmrazor.GeneralQuant',
    architecture=_base_.model,
    quantizer=dict(type='mmrazor.CustomQuantizer', qconfig=_base_.qconfig),
    # mmdet publishes no weights of it: those of a training with the stock config.
    float_checkpoint='work_dirs/yolox_nano_8xb8-300e_coco/epoch_300.pth',
)
test_cfg = dict(type='mmrazor.PTQLoop', calibrate_steps=32)
