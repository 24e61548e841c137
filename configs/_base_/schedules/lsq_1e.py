# As lsq_90e.py for 8 bits: one epoch with a hundredth of the learning rate of float training.
_base_ = './lsq_90e.py'

qat_loop = dict(max_epochs=1)
qat_optim_wrapper = dict(optimizer=dict(lr=0.001))
qat_param_scheduler = [dict(type='CosineAnnealingLR', T_max=1, by_epoch=True, convert_to_iter_based=True)]
