# Mask R-CNN: 8-bit weights and activations, trained quantization-aware.
_base_ = [
    'mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py',
    '../_base_/qconfigs/w8a8_ema.py',
    '../_base_/schedules/qat_det_6e.py',
]

model = dict(
    _delete_=True,
    type='mmrazor.GeneralQuant',
    architecture=_base_.model,
    quantizer=dict(type='mmrazor.CustomQuantizer', qconfig=_base_.qconfig),
    float_checkpoint='https://download.openmmlab.com/mmdetection/v2.0/mask_rcnn/'
    'mask_rcnn_r50_fpn_1x_coco/mask_rcnn_r50_fpn_1x_coco_20200205-d4b0c5d6.pth',
)
train_cfg = dict(_delete_=True, **_base_.qat_loop)
optim_wrapper = dict(_delete_=True, **_base_.qat_optim_wrapper)
param_scheduler = _base_.qat_param_scheduler
default_hooks = dict(checkpoint=dict(interval=1, max_keep_ckpts=2))
auto_scale_lr = dict(base_batch_size=16)
