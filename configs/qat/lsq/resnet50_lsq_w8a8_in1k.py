# ResNet-50: 8-bit weights and activations with learned scales (LSQ),
# in one epoch and with a smaller learning rate than at 4 bits.
_base_ = './resnet50_lsq_w4a4_in1k.py'

model = dict(quantizer=dict(qconfig=dict(w_qscheme=dict(bit=8), a_qscheme=dict(bit=8))))
train_cfg = dict(max_epochs=1)
optim_wrapper = dict(optimizer=dict(lr=0.001))
param_scheduler = [dict(type='CosineAnnealingLR', T_max=1, by_epoch=True, convert_to_iter_based=True)]
