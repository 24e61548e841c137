# YOLOX-nano: 8-bit weights and activations, trained quantization-aware.
_base_ = [
    'mmdet::yolox/yolox_nano_8xb8-300e_coco.py',
    '../_base_/qconfigs/w8a8_ema.py',
    '../_base_/schedules/qat_det_6e.py',
]

model = dict(
    _delete_=True,
    type='mmrazor.GeneralQuant',
    architecture=_base_.model,
    quantizer=dict(type='mmrazor.CustomQuantizer', qconfig=_base_.qconfig),
    # mmdet publishes no weights of it: those of a training with the stock config.
    float_checkpoint='work_dirs/yolox_nano_8xb8-300e_coco/epoch_300.pth',
)
train_cfg = dict(_delete_=True, **_base_.qat_loop)
optim_wrapper = dict(_delete_=True, **_base_.qat_optim_wrapper)
param_scheduler = _base_.qat_param_scheduler
# Without mosaic and mix-up from the start, as in the last epochs of the stock schedule.
custom_hooks = [
    dict(type='YOLOXModeSwitchHook', num_last_epochs=_base_.qat_epochs - 1, priority=48),
    *_base_.custom_hooks[1:],
]
default_hooks = dict(checkpoint=dict(interval=1, max_keep_ckpts=2))
auto_scale_lr = dict(base_batch_size=16)
