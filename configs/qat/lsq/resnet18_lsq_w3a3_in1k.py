# ResNet-18: 3-bit weights and activations with learned scales (LSQ), and less weight decay than at 4 bits.
_base_ = './resnet18_lsq_w4a4_in1k.py'

model = dict(quantizer=dict(qconfig=dict(w_qscheme=dict(bit=3), a_qscheme=dict(bit=3))))
optim_wrapper = dict(optimizer=dict(weight_decay=5e-5))
