# As cifar10_lsq_4e.py, for 2 bits: ten epochs, less weight decay.
_base_ = './cifar10_lsq_4e.py'

train_cfg = dict(max_epochs=10)
optim_wrapper = dict(optimizer=dict(lr=0.01, weight_decay=2.5e-5))
param_scheduler = [dict(type='CosineAnnealingLR', T_max=10, by_epoch=True, convert_to_iter_based=True)]
custom_hooks = [dict(type='EMAHook', momentum=0.005)]
