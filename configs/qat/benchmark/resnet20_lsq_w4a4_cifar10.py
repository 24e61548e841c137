# ResNet-20 on CIFAR-10 (float: 88.50 %): 4-bit weights and activations with learned scales (LSQ).
_base_ = [
    '../../_base_/models/resnet20_cifar.py',
    '../../_base_/datasets/cifar10_jpeg.py',
    '../../_base_/schedules/cifar10_lsq_4e.py',
    '../../_base_/qconfigs/lsq_w4a4.py',
    '../../_base_/default_runtime.py',
]

model = dict(
    _delete_=True,
    type='mmrazor.GeneralQuant',
    architecture=_base_.model,
    # Weights with a zero point: their distributions are not symmetric, and of 4 bits none can be wasted.
    quantizer=dict(
        type='mmrazor.CustomQuantizer',
        qconfig=dict(_base_.qconfig, w_qscheme=dict(bit=4, is_symmetry=False, is_per_channel=True)),
    ),
    float_checkpoint=f'{_base_.data_root}/weights/resnet20_cifar10jpeg_mmcls.pth',
    # The float network has learned the labels of these images by heart: what it makes of the other classes says more.
    distillation=dict(module='head', loss='kl', temperature=4.0),
)
