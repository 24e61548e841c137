# ResNet-20 on CIFAR-10: 3-bit weights in all layers, 8-bit activations, full ranges.
_base_ = './resnet20_w8a8_cifar10.py'

model = dict(quantizer=dict(qconfig=dict(w_qscheme=dict(bit=3))))
