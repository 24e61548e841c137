# Faster R-CNN: 8-bit weights and activations, quantized after training.
_base_ = [
    'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py',
    '../_base_/qconfigs/w8a8_minmax.py',
]

model = dict(
    _delete_=True,
    type='mmrazor.GeneralQuant',
    architecture=_base_.model,
    quantizer=dict(type='mmrazor.CustomQuantizer', qconfig=_base_.qconfig),
    float_checkpoint='https://download.openmmlab.com/mmdetection/v2.0/faster_rcnn/'
    'faster_rcnn_r50_fpn_1x_coco/faster_rcnn_r50_fpn_1x_coco_20200130-047c8118.pth',
)
test_cfg = dict(type='mmrazor.PTQLoop', calibrate_steps=32)
