# As w8a8_minmax.py, with activations clipped where the error is least: for networks with outliers.
_base_ = './w8a8_minmax.py'

qconfig = dict(a_observer=dict(type='mmrazor.MSEObserver', p=2.4))
