# LSQ+, 4 bits: as lsq_w4a4.py, with a learned offset of activations.
_base_ = './lsq_w4a4.py'

qconfig = dict(
    w_fake_quant=dict(type='mmrazor.LSQPlusFakeQuantize'),
    a_fake_quant=dict(type='mmrazor.LSQPlusFakeQuantize'),
)
