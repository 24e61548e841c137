# ResNet-20 on CIFAR-10 (float: 88.50 %): 8 bits, for integer arithmetic only (IAO).
_base_ = [
    '../../_base_/models/resnet20_cifar.py',
    '../../_base_/datasets/cifar10_jpeg.py',
    '../../_base_/schedules/cifar10_iao_4e.py',
    '../../_base_/qconfigs/iao_w8a8.py',
    '../../_base_/default_runtime.py',
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
    float_checkpoint=f'{_base_.data_root}/weights/resnet20_cifar10jpeg_mmcls.pth',
)
