# RTMDet-tiny: 8-bit weights and activations, quantized after training.
_base_ = [
    'mmdet::rtmdet/rtmdet_tiny_8xb32-300e_coco.py',
    '../_base_/qconfigs/w8a8_minmax.py',
]

model = dict(
    _delete_=True,
    type='mmrazor.GeneralQuant',
    architecture=_base_.model,
    quantizer=dict(type='mmrazor.CustomQuantizer', qconfig=_base_.qconfig),
    float_checkpoint='https://download.openmmlab.com/mmdetection/v3.0/rtmdet/'
    'rtmdet_tiny_8xb32-300e_coco/rtmdet_tiny_8xb32-300e_coco_20220902_112414-78e30dcc.pth',
)
test_cfg = dict(type='mmrazor.PTQLoop', calibrate_steps=32)
