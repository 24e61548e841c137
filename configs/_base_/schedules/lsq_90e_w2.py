# As lsq_90e.py, with a quarter of the weight decay, for 2 bits.
_base_ = './lsq_90e.py'

qat_optim_wrapper = dict(optimizer=dict(weight_decay=2.5e-5))
