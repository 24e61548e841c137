# ResNet-20 on CIFAR-10: 3-bit weights with the ranges that make the least error of a layer's output, 8-bit activations.
_base_ = './resnet20_w3a8_cifar10.py'

test_cfg = dict(extra_steps=[dict(type='mmrazor.WeightRangeMSE')])
