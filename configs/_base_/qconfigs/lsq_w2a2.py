# As lsq_w4a4.py, with 2 bits.
_base_ = './lsq_w4a4.py'

qconfig = dict(w_qscheme=dict(bit=2), a_qscheme=dict(bit=2))
