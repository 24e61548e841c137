# As lsq_90e.py, with half the weight decay, for 3 bits.
_base_ = './lsq_90e.py'

qat_optim_wrapper = dict(optimizer=dict(weight_decay=5e-5))
