# YOLOX-s: 8-bit weights and activations, quantized after training.
_base_ = [
    'mmdet::yolox/yolox_s_8xb8-300e_coco.py',
    '../_base_/qconfigs/w8a8_minmax.py',
]

model = dict(
    _delete_=True,
    type='mmrazor.GeneralQuant',
    architecture=_base_.model,
    quantizer=dict(type='mmrazor.CustomQuantizer', qconfig=_base_.qconfig),
    float_checkpoint='https://download.openmmlab.com/mmdetection/v2.0/yolox/'
    'yolox_s_8x8_300e_coco/yolox_s_8x8_300e_coco_20211121_095711-4592a793.pth',
)
test_cfg = dict(type='mmrazor.PTQLoop', calibrate_steps=32)
