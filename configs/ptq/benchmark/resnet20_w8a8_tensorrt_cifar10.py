# As resnet20_w8a8_cifar10.py, with quantizers where TensorRT has them, and the symmetric activations that it takes.
_base_ = './resnet20_w8a8_cifar10.py'

model = dict(quantizer=dict(backend='tensorrt', qconfig=dict(a_qscheme=dict(is_symmetry=True))))
