# The same backbone quantized; it is named in custom_imports as a float one is, and needs nothing else:
#   python tools/test.py configs/examples/tinynet_w8a8_cifar10.py work_dirs/tinynet_cifar10/epoch_20.pth
_base_ = ['./tinynet_cifar10.py', '../_base_/qconfigs/w8a8_minmax.py']

model = dict(
    _delete_=True,
    type='mmrazor.GeneralQuant',
    architecture=_base_.model,
    quantizer=dict(type='mmrazor.CustomQuantizer', qconfig=_base_.qconfig),
    input_shape=(3, 32, 32),
)
test_cfg = dict(type='mmrazor.PTQLoop', calibrate_steps=16)
