# LSQ on CIFAR-10, in batches of 64: start values from 1,024 images, four epochs of cosine decay.
train_cfg = dict(
    type='mmrazor.QATEpochBasedLoop',
    max_epochs=4,
    val_interval=1,
    calibrate_steps=16,
    # From the calibration on scales are learned.
    observe_end=0,
    # A must for this network: the batch norms of its shortcuts do nothing, and would begin to.
    freeze_bn_begin=0,
)
optim_wrapper = dict(
    type='OptimWrapper',
    # Learned scales have no weight decay.
    constructor='mmrazor.QuantOptimWrapperConstructor',
    optimizer=dict(type='SGD', lr=0.0005, momentum=0.9, weight_decay=1e-4),
)
param_scheduler = [dict(type='CosineAnnealingLR', T_max=4, by_epoch=True, convert_to_iter_based=True)]
# What is evaluated is the average of the last thousand steps, which 20,000 images make noisy.
custom_hooks = [dict(type='EMAHook', momentum=0.001)]
val_cfg = dict()
test_cfg = dict(type='mmrazor.PTQLoop', calibrate_steps=16)
