# As w4a4_mse.py, with ranges that follow weights and activations during training.
_base_ = './w4a4_mse.py'

qconfig = dict(
    w_observer=dict(_delete_=True, type='mmrazor.EMAMinMaxObserver'),
    a_observer=dict(_delete_=True, type='mmrazor.EMAMinMaxObserver'),
)
