# Swin-T: 8-bit weights and activations, trained quantization-aware.
_base_ = [
    'mmcls::swin_transformer/swin-tiny_16xb64_in1k.py',
    '../_base_/qconfigs/w8a8_ema.py',
    '../_base_/schedules/qat_10e_adamw.py',
]

model = dict(
    _delete_=True,
    type='mmrazor.GeneralQuant',
    architecture=_base_.model,
    quantizer=dict(type='mmrazor.CustomQuantizer', qconfig=_base_.qconfig),
    float_checkpoint='https://download.openmmlab.com/mmclassification/v0/'
    'swin-transformer/swin_tiny_224_b16x64_300e_imagenet_20210616_090925-66df6be6.pth',
)
train_cfg = dict(_delete_=True, **_base_.qat_loop)
optim_wrapper = dict(_delete_=True, **_base_.qat_optim_wrapper)
param_scheduler = _base_.qat_param_scheduler
auto_scale_lr = dict(base_batch_size=1024)
