# ViT-B/16 at 384x384: 8-bit weights and activations, trained quantization-aware.
_base_ = [
    'mmcls::vision_transformer/vit-base-p16_ft-64xb64_in1k-384.py',
    '../_base_/qconfigs/w8a8_ema.py',
    '../_base_/schedules/qat_10e_adamw.py',
]

model = dict(
    _delete_=True,
    type='mmrazor.GeneralQuant',
    architecture=_base_.model,
    quantizer=dict(type='mmrazor.CustomQuantizer', qconfig=_base_.qconfig),
    float_checkpoint='https://download.openmmlab.com/mmclassification/v0/'
    'vit/finetune/vit-base-p16_in21k-pre-3rdparty_ft-64xb64_in1k-384_20210928-98e8652b.pth',
)
train_cfg = dict(_delete_=True, **_base_.qat_loop)
optim_wrapper = dict(_delete_=True, **_base_.qat_optim_wrapper)
param_scheduler = _base_.qat_param_scheduler
auto_scale_lr = dict(base_batch_size=1024)
