# Training is quantization-aware, testing calibrates first: on 1,024 images, in batches of 64.
_base_ = './qat_10e.py'

train_cfg = _base_.qat_loop
optim_wrapper = _base_.qat_optim_wrapper
param_scheduler = _base_.qat_param_scheduler
val_cfg = dict()
test_cfg = dict(type='mmrazor.PTQLoop', calibrate_steps=16)
