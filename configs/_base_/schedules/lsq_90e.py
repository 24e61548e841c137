# The recipe of LSQ (Esser et al. 2020, section 3) from a float checkpoint, as variables: mmengine allows a name in one
# base only. A tenth of the learning rate of float training, cosine decay; for a total batch of 256 images, 4 bits.
qat_loop = dict(
    type='mmrazor.QATEpochBasedLoop',
    max_epochs=90,
    val_interval=1,
    # Start values; from then on scales are learned.
    calibrate_steps=16,
    observe_end=0,
)
qat_optim_wrapper = dict(
    type='OptimWrapper',
    # Learned scales have no weight decay.
    constructor='mmrazor.QuantOptimWrapperConstructor',
    optimizer=dict(type='SGD', lr=0.01, momentum=0.9, weight_decay=1e-4),
)
# A list replaces whatever the stock config has.
qat_param_scheduler = [dict(type='CosineAnnealingLR', T_max=90, by_epoch=True, convert_to_iter_based=True)]
