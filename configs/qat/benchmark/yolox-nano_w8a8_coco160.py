# YOLOX-nano (float: 31.9 mAP on the same 94 images): 8-bit weights and activations, trained quantization-aware on 160
# images of COCO with YOLOX's own hooks.
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
train_cfg = dict(
    _delete_=True,
    type='mmrazor.QATEpochBasedLoop',
    max_epochs=3,
    val_interval=1,
    calibrate_steps=20,
    # The ranges are those of the calibration: averaged over batches of all sizes they cut off too much.
    observe_end=0,
    freeze_bn_begin=0,
)
# AdamW: SGD at a learning rate of 2e-5 ended the first epoch at 0.0 mAP.
optim_wrapper = dict(_delete_=True, type='OptimWrapper', optimizer=dict(type='AdamW', lr=5e-6, weight_decay=0.0))
param_scheduler = [dict(type='CosineAnnealingLR', T_max=3, by_epoch=True, convert_to_iter_based=True)]
# The loss on boxes that YOLOX adds for its last epochs begins with the second epoch.
custom_hooks = [dict(type='YOLOXModeSwitchHook', num_last_epochs=1, priority=48), *_base_.custom_hooks[1:]]
auto_scale_lr = dict(_delete_=True, base_batch_size=8)
