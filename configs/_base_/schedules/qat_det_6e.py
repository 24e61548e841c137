# A short fine-tuning of a detector from a float checkpoint, as variables: mmengine allows a name in one base only, and
# the stock configs have schedules of their own. The learning rate is that of a total batch of 16 images.
qat_epochs = 6
qat_loop = dict(
    type='mmrazor.QATEpochBasedLoop',
    max_epochs=6,
    val_interval=1,
    calibrate_steps=32,
    # Ranges follow the weights as long as those move.
    observe_end=5,
    # Batch norms keep the statistics of float training, which so few steps would only make noisier.
    freeze_bn_begin=0,
)
qat_optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='SGD', lr=0.0002, momentum=0.9, weight_decay=1e-4),
)
# A list replaces whatever the stock config has.
qat_param_scheduler = [dict(type='CosineAnnealingLR', T_max=6, by_epoch=True, convert_to_iter_based=True)]
