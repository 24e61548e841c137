# RTMDet-tiny: 8-bit weights and activations, trained quantization-aware.
_base_ = [
    'mmdet::rtmdet/rtmdet_tiny_8xb32-300e_coco.py',
    '../_base_/qconfigs/w8a8_ema.py',
    '../_base_/schedules/qat_det_6e_adamw.py',
]

model = dict(
    _delete_=True,
    type='mmrazor.GeneralQuant',
    architecture=_base_.model,
    quantizer=dict(type='mmrazor.CustomQuantizer', qconfig=_base_.qconfig),
    float_checkpoint='https://download.openmmlab.com/mmdetection/v3.0/rtmdet/'
    'rtmdet_tiny_8xb32-300e_coco/rtmdet_tiny_8xb32-300e_coco_20220902_112414-78e30dcc.pth',
)
train_cfg = dict(_delete_=True, **_base_.qat_loop)
optim_wrapper = dict(_delete_=True, **_base_.qat_optim_wrapper)
param_scheduler = _base_.qat_param_scheduler
# Without mosaic and mix-up from the start, as in the last epochs of the stock schedule.
custom_hooks = [_base_.custom_hooks[0], dict(_base_.custom_hooks[1], switch_epoch=0)]
default_hooks = dict(checkpoint=dict(interval=1, max_keep_ckpts=2))
auto_scale_lr = dict(base_batch_size=16)
