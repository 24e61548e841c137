# Quantization-aware training at 4 bits: python tools/train.py configs/quickstart/qat_w4a4.py
# As ptq_w4a4.py, and then the float weights are trained on with the quantization in the network.
_base_ = ['ptq_w4a4.py']

work_dir = 'work_dirs/quickstart/qat_w4a4'

train_cfg = dict(
    _delete_=True,
    type='mmrazor.QATEpochBasedLoop',
    max_epochs=15,
    val_interval=5,
    calibrate_steps=10,
    freeze_bn_begin=10,
)
optim_wrapper = dict(optimizer=dict(lr=0.01))
param_scheduler = dict(T_max=15)
default_hooks = dict(checkpoint=dict(interval=15))
