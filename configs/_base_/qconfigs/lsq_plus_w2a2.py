# LSQ+, 2 bits: as lsq_w2a2.py, with a learned offset of activations and other start values of weights.
_base_ = './lsq_w2a2.py'

qconfig = dict(
    w_observer=dict(_delete_=True, type='mmrazor.LSQPlusObserver'),
    w_fake_quant=dict(type='mmrazor.LSQPlusFakeQuantize'),
    a_fake_quant=dict(type='mmrazor.LSQPlusFakeQuantize'),
)
