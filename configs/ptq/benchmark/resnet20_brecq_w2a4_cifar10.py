# ResNet-20 on CIFAR-10 (float: 88.50 %): 2-bit weights and 4-bit activations, first and last layer 8 bits,
# reconstructed by BRECQ on 1,024 images.
_base_ = [
    '../../_base_/models/resnet20_cifar.py',
    '../../_base_/datasets/cifar10_jpeg.py',
    '../../_base_/schedules/cifar10_qat_10e.py',
    '../../_base_/qconfigs/w2a4_reconstruction.py',
    '../../_base_/default_runtime.py',
]

model = dict(
    _delete_=True,
    type='mmrazor.GeneralQuant',
    architecture=_base_.model,
    quantizer=dict(type='mmrazor.CustomQuantizer', qconfig=_base_.qconfig),
    float_checkpoint=f'{_base_.data_root}/weights/resnet20_cifar10jpeg_mmcls.pth',
)
test_cfg = dict(
    _delete_=True,
    type='mmrazor.PTQLoop',
    calibrate_steps=16,
    reconstruction=dict(type='mmrazor.BRECQ', iters=300),
)
