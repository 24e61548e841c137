# Post-training quantization to 4 bits: python tools/test.py configs/quickstart/ptq_w4a4.py
# As ptq_w8a8.py, with other bits.
_base_ = ['ptq_w8a8.py']

work_dir = 'work_dirs/quickstart/ptq_w4a4'

model = dict(quantizer=dict(qconfig=dict(w_qscheme=dict(bit=4), a_qscheme=dict(bit=4))))
