# As resnet20_qdrop_w2a4_cifar10.py, reconstructed by BRECQ.
_base_ = './resnet20_qdrop_w2a4_cifar10.py'

test_cfg = dict(reconstruction=dict(type='mmrazor.BRECQ'))
