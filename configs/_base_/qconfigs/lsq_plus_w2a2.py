# LSQ+, 2 bits: as lsq_w2a2.py, with a learned offset of activations.
_base_ = './lsq_w2a2.py'

qconfig = dict(
    w_fake_quant=dict(type='mmrazor.LSQPlusFakeQuantize'),
    a_fake_quant=dict(type='mmrazor.LSQPlusFakeQuantize'),
)
