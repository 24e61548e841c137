# ResNet-20 on CIFAR-10: 3-bit weights, 8-bit activations, full ranges, mean outputs of the layers corrected.
_base_ = './resnet20_w3a8_cifar10.py'

test_cfg = dict(extra_steps=[dict(type='mmrazor.BiasCorrection')])
