# EfficientNet-B0: 2-bit weights and activations with learned scales and offsets (LSQ+).
_base_ = '../lsq/efficientnet-b0_lsq_w2a2_in1k.py'

qconfig = dict(
    w_fake_quant=dict(type='mmrazor.LSQPlusFakeQuantize'),
    a_fake_quant=dict(type='mmrazor.LSQPlusFakeQuantize'),
)
model = dict(quantizer=dict(qconfig=qconfig))
# At the learning rate of the weights offsets do not converge.
optim_wrapper = dict(paramwise_cfg=dict(offset_lr_mult=0.1))
