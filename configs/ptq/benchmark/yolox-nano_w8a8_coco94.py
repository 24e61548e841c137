# YOLOX-nano: 8-bit weights and activations, quantized after training on 160 images of COCO, evaluated on 94 others.
# Float: 31.9 mAP, which is not comparable with results on the whole validation set.
_base_ = [
    '../../_base_/models/yolox-nano_coco94.py',
    '../../_base_/qconfigs/w8a8_yolox-nano.py',
]

model = dict(
    _delete_=True,
    type='mmrazor.GeneralQuant',
    architecture=_base_.model,
    quantizer=dict(type='mmrazor.CustomQuantizer', qconfig=_base_.qconfig),
    float_checkpoint=_base_.float_checkpoint,
)
test_cfg = dict(type='mmrazor.PTQLoop', calibrate_dataloader=_base_.calibrate_dataloader, calibrate_steps=20)
