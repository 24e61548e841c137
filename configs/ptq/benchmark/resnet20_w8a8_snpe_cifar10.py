# As resnet20_w8a8_cifar10.py, with quantizers where the HTP of SNPE and QNN has them.
_base_ = './resnet20_w8a8_cifar10.py'

model = dict(quantizer=dict(backend='snpe'))
