# FCOS: 8-bit weights and activations, quantized after training.
_base_ = [
    'mmdet::fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py',
    '../_base_/qconfigs/w8a8_minmax.py',
]

model = dict(
    _delete_=True,
    type='mmrazor.GeneralQuant',
    architecture=_base_.model,
    quantizer=dict(type='mmrazor.CustomQuantizer', qconfig=_base_.qconfig),
    float_checkpoint='https://download.openmmlab.com/mmdetection/v2.0/fcos/'
    'fcos_r50_caffe_fpn_gn-head_1x_coco/fcos_r50_caffe_fpn_gn-head_1x_coco-821213aa.pth',
)
test_cfg = dict(type='mmrazor.PTQLoop', calibrate_steps=32)
