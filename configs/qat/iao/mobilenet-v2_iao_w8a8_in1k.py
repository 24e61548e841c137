# MobileNetV2: 8 bits, for integer arithmetic only (IAO).
_base_ = [
    'mmcls::mobilenet_v2/mobilenet-v2_8xb32_in1k.py',
    '../../_base_/qconfigs/iao_w8a8.py',
    '../../_base_/schedules/iao_10e.py',
]

model = dict(
    _delete_=True,
    type='mmrazor.GeneralQuant',
    architecture=_base_.model,
    quantizer=dict(
        type='mmrazor.CustomQuantizer',
        qconfig=_base_.qconfig,
        quantize_add=True,
        bn_folding='batch',
        quantize_bias=True,
    ),
    float_checkpoint='https://download.openmmlab.com/mmclassification/v0/'
    'mobilenet_v2/mobilenet_v2_batch256_imagenet_20200708-3b2dc3af.pth',
)
train_cfg = dict(_delete_=True, **_base_.qat_loop)
optim_wrapper = dict(_delete_=True, **_base_.qat_optim_wrapper)
param_scheduler = _base_.qat_param_scheduler
auto_scale_lr = dict(base_batch_size=256)
