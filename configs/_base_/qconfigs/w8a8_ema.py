# As w8a8_minmax.py, with ranges that follow weights and activations during training.
_base_ = './w8a8_minmax.py'

qconfig = dict(
    w_observer=dict(type='mmrazor.EMAMinMaxObserver'),
    a_observer=dict(type='mmrazor.EMAMinMaxObserver'),
)
