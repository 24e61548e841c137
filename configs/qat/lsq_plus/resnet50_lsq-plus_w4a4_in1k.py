# ResNet-50: 4-bit weights and activations with learned scales and offsets (LSQ+).
_base_ = '../lsq/resnet50_lsq_w4a4_in1k.py'

qconfig = dict(
    w_fake_quant=dict(type='mmrazor.LSQPlusFakeQuantize'),
    a_fake_quant=dict(type='mmrazor.LSQPlusFakeQuantize'),
)
model = dict(quantizer=dict(qconfig=qconfig))
# At the learning rate of the weights offsets do not converge.
optim_wrapper = dict(paramwise_cfg=dict(offset_lr_mult=0.1))
