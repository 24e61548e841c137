# As resnet20_w8a8_cifar10.py, with ranges of activations from the very tensor, for ONNX Runtime's dynamic quantization.
_base_ = './resnet20_w8a8_cifar10.py'

model = dict(
    quantizer=dict(
        backend='onnxruntime_dynamic',
        qconfig=dict(a_fake_quant=dict(type='mmrazor.DynamicFakeQuantize'), a_qscheme=dict(is_symmetry=False)),
    )
)
