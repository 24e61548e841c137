# DETR: 8-bit weights and activations, quantized after training.
_base_ = [
    'mmdet::detr/detr_r50_8xb2-150e_coco.py',
    '../_base_/qconfigs/w8a8_minmax.py',
]

model = dict(
    _delete_=True,
    type='mmrazor.GeneralQuant',
    architecture=_base_.model,
    quantizer=dict(type='mmrazor.CustomQuantizer', qconfig=_base_.qconfig),
    float_checkpoint='https://download.openmmlab.com/mmdetection/v3.0/detr/'
    'detr_r50_8xb2-150e_coco/detr_r50_8xb2-150e_coco_20221023_153551-436d03e8.pth',
)
test_cfg = dict(type='mmrazor.PTQLoop', calibrate_steps=32)
