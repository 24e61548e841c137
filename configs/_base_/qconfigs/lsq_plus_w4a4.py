# LSQ+, 4 bits: as lsq_w4a4.py, with a learned offset of activations and other start values of weights.
_base_ = './lsq_w4a4.py'

qconfig = dict(
    w_observer=dict(_delete_=True, type='mmrazor.LSQPlusObserver'),
    w_fake_quant=dict(type='mmrazor.LSQPlusFakeQuantize'),
    a_fake_quant=dict(type='mmrazor.LSQPlusFakeQuantize'),
)
