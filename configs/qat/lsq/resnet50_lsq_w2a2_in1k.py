# ResNet-50: 2-bit weights and activations with learned scales (LSQ), and less weight decay than at 4 bits.
_base_ = './resnet50_lsq_w4a4_in1k.py'

model = dict(quantizer=dict(qconfig=dict(w_qscheme=dict(bit=2), a_qscheme=dict(bit=2))))
optim_wrapper = dict(optimizer=dict(weight_decay=2.5e-5))
