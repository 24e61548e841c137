# MobileNetV2: 8-bit weights and activations, quantized after training on 200 images of ImageNet, evaluated on 650
# others. Float: 78.46 %, which is not comparable with results on the whole validation set.
_base_ = [
    'mmcls::_base_/models/mobilenet_v2_1x.py',
    '../../_base_/datasets/imagenet_calib200.py',
    '../../_base_/qconfigs/w8a8_minmax.py',
    '../../_base_/default_runtime.py',
]

model = dict(
    _delete_=True,
    type='mmrazor.GeneralQuant',
    architecture=dict(
        **_base_.model,
        data_preprocessor=dict(num_classes=1000, mean=[128.0] * 3, std=[128.0] * 3, to_rgb=True),
    ),
    quantizer=dict(type='mmrazor.CustomQuantizer', qconfig=_base_.qconfig),
    float_checkpoint=f'{_base_.data_root}/weights/mobilenet_v2_1.0_224_imagenet_mmcls.pth',
)
test_cfg = dict(type='mmrazor.PTQLoop', calibrate_dataloader=_base_.calibrate_dataloader, calibrate_steps=8)
