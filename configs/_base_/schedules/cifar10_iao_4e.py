# IAO on CIFAR-10, in batches of 64: activations are quantized after an epoch of observation.
train_cfg = dict(
    type='mmrazor.QATEpochBasedLoop',
    max_epochs=4,
    val_interval=1,
    act_quant_begin=1,
    # A must for this network: the batch norms of its shortcuts do nothing, and would begin to.
    freeze_bn_begin=0,
)
optim_wrapper = dict(
    type='OptimWrapper',
    # 8 bits change little, and 20,000 of the images that the float network was trained on make it forget the others.
    optimizer=dict(type='SGD', lr=0.00002, momentum=0.9, weight_decay=1e-4),
)
param_scheduler = [dict(type='CosineAnnealingLR', T_max=4, by_epoch=True, convert_to_iter_based=True)]
val_cfg = dict()
test_cfg = dict(type='mmrazor.PTQLoop', calibrate_steps=16)
