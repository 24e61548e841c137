# Training is quantization-aware, testing calibrates first: on 1,024 images, in batches of 64.
_base_ = './qat_10e.py'

# Its frozen batch norms are a must for this network: those of its shortcuts do nothing, and would begin to.
train_cfg = _base_.qat_loop
# In batches of 64.
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='SGD', lr=0.005, momentum=0.9, weight_decay=1e-4),
)
param_scheduler = _base_.qat_param_scheduler
val_cfg = dict()
test_cfg = dict(type='mmrazor.PTQLoop', calibrate_steps=16)
